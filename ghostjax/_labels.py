"""Labels: to which example each row, or each position of each row, belongs."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._loss import Loss
from ghostjax.core import Labels


def check_labels(loss: Loss, labels: Any, num_labels: int | None) -> Labels | None:
    """``labels`` and their number as the walks take them."""
    if labels is None and num_labels is None:
        return None
    if labels is None or num_labels is None or operator.index(num_labels) < 1:
        found = "none" if labels is None else np.shape(labels)
        raise ValueError(
            "labels and num_labels go together: integers [B] or [B, T], and how many examples they "
            f"number from 0, at least 1. Found labels {found}, num_labels={num_labels}."
        )
    shape, dtype = jnp.shape(labels), jnp.result_type(labels)
    if (
        len(shape) not in (1, 2)
        or shape[0] != loss.num_rows
        or not jnp.issubdtype(dtype, jnp.integer)
    ):
        raise ValueError(
            f"labels must be integers [B] or [B, T] of B = {loss.num_rows} rows. Found "
            f"{dtype}{list(shape)}."
        )
    if len(shape) == 2 and loss.per_example:
        raise ValueError(
            "labels [B, T] tell positions apart, which is followed in losses of whole batches "
            "only. Leave out per_example, or give one label per row."
        )
    if not isinstance(labels, jax.core.Tracer) and np.asarray(labels).max() >= num_labels:
        raise ValueError(
            f"labels must be less than num_labels = {num_labels}. Found {np.asarray(labels).max()}."
        )
    # All negative numbers say the same; among those of places, they tell more.
    return Labels(jnp.maximum(jnp.asarray(labels), -1), operator.index(num_labels))


def positions_of(labels: Labels | None) -> Labels | None:
    """Labels that the walk has to follow; those of rows are taken at the end."""
    return labels if labels is not None and labels.ids.ndim == 2 else None


def by_row_label(dots: list[Any], shared: list[Any], labels: Labels | None):
    """Dots of rows [..., B] added up by label, [..., S]; what belongs to nobody to ``shared``."""
    if labels is None or labels.ids.ndim == 2:
        return dots, shared
    ids = jnp.where(labels.ids < 0, labels.count, labels.ids)

    def summed(leaf):
        zeros = jnp.zeros((*leaf.shape[:-1], labels.count + 1), leaf.dtype)
        return zeros.at[..., ids].add(leaf, mode="drop")

    sums = [summed(leaf) for leaf in dots]
    rest = [leaf + own[..., -1] for leaf, own in zip(shared, sums)]
    return [own[..., :-1] for own in sums], rest


def counted(conflicts: dict[str, Any], labels: Labels | None) -> jax.Array:
    """How many places have no example, as gradient flows from several into them."""
    counts = [jnp.sum(count, dtype=jnp.int32) for count in conflicts.values()]
    if labels is not None:
        counts.append(jnp.sum(labels.ids >= labels.count, dtype=jnp.int32))
    return sum(counts, jnp.zeros((), jnp.int32))


def or_nan(dots: list[Any], conflicts: jax.Array) -> list[Any]:
    """NaN where there is no number that is right."""
    return [jnp.where(conflicts > 0, jnp.nan, leaf) for leaf in dots]
