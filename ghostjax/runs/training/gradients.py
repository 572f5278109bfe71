"""Gradients of training rows, whole or in parts, and of validation rows through the optimizer."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghostjax import directions, fidelity
from ghostjax._aggregate import aggregate
from ghostjax._norms import squared_norms

PARTS = 2  # of a step's validation rows, for the sampling error of the scores


def mean_and_losses(row_losses: Callable[[Any, Any], jax.Array]):
    """``(params, rows) -> mean of the losses, losses [B]``."""

    def loss_fn(params, rows):
        losses = row_losses(params, rows)
        return jnp.mean(losses), losses

    return loss_fn


def mean_of(row_losses: Callable[[Any, Any], jax.Array]):
    """``(params, rows) -> mean of the losses``."""
    return lambda params, rows: jnp.mean(row_losses(params, rows))


def in_parts(rows: Any, count: int) -> Any:
    """Rows [B, ...] as ``count`` parts of a batch, [count, B / count, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), rows)


def gradient_in_parts(
    row_losses: Callable[[Any, Any], jax.Array], params: Any, parts: Any
) -> tuple[jax.Array, Any]:
    """Losses [B] and the gradient of their mean, one part of the batch after another."""

    loss_fn = mean_and_losses(row_losses)

    def add(total, rows):
        (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
        return jax.tree.map(jnp.add, total, grads), losses

    total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return losses.reshape(-1), jax.tree.map(lambda leaf: leaf / len(losses), total)


def make_norms(row_losses: Callable[[Any, Any], jax.Array], microbatches: int):
    """``(params, rows) -> [B]``, the norms of the gradients of the rows' own losses, to be jitted.

    A forward and a backward pass of their own.
    """
    squared = squared_norms(row_losses)

    def norms(params, rows):
        parts = in_parts(rows, microbatches)
        squares = jax.lax.map(lambda part: aggregate(squared(params, part)), parts)
        return jnp.sqrt(jnp.maximum(squares.reshape(-1), 0))  # below zero by rounding

    return norms


@contextlib.contextmanager
def silent_micro_steps() -> Iterator[None]:
    """Without the warning of ``optax.MultiSteps``: a run refuses to score what gathers only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="optax.MultiSteps")
        yield


class Directed(NamedTuple):
    """An update, and what its rows' gradients are multiplied with; K validation sets.

    Attributes:
      updates, opt_state: what the optimizer makes of the gradient.
      directions: trees like the parameters, [K * PARTS + K] of each: those of the parts of the
        validation sets, through the optimizer; then the sets' own validation gradients.
      predicted: [K], the decreases of the validation losses that the update is predicted to cause.
      undefined: as ``directions.count_undefined``.
      val_losses: [K, V] before the update, of order 1; else None, as they take a pass of their own.
    """

    updates: Any
    opt_state: Any
    directions: Any
    predicted: jax.Array
    undefined: jax.Array
    val_losses: jax.Array | None


def make_directed(
    row_losses: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    order: int,
):
    """``(params, opt_state, grads, val_rows) -> Directed``, to be jitted.

    Args:
      order: 1 for validation gradients at the parameters, 2 for the midpoint of the update.
    """
    loss_fn = mean_and_losses(row_losses)

    def directed(params, opt_state, grads, val_rows):
        sets = jax.tree.leaves(val_rows)[0].shape[0]
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), val_rows)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)

        def of_part(rows):
            if order == 1:
                (_, losses), part = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
                return part, losses
            mean_loss = mean_of(row_losses)
            return directions.midpoint(mean_loss, params, updates, rows), None

        part_grads, losses = jax.lax.map(of_part, parts)
        val_grads = jax.tree.map(
            lambda leaf: leaf.reshape(sets, PARTS, *leaf.shape[1:]).mean(1), part_grads
        )
        with silent_micro_steps():
            by_part = directions.through_optimizer(optimizer, opt_state, params, grads, part_grads)
        return Directed(
            updates,
            new_opt_state,
            jax.tree.map(lambda *leaves: jnp.concatenate(leaves), by_part, val_grads),
            jax.vmap(fidelity.predicted_decrease, in_axes=(0, None))(val_grads, updates),
            directions.count_undefined(optimizer, opt_state, params, grads),
            None if losses is None else losses.reshape(sets, -1),
        )

    return directed
