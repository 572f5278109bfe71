"""Redoing some rows by autodiff of other batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MAX_CONSERVATION_ERROR = 0.03  # bfloat16 models are at a hundredth, float32 ones at 1e-5
MAX_AUDIT_ERROR = MAX_CONSERVATION_ERROR


def audit(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    batch: Any,
    *args: Any,
    direction: Any,
    dots: jax.Array,
    rows: jax.Array,
    shared: Any = None,
    row_weights: jax.Array | None = None,
    **kwargs: Any,
) -> jax.Array:
    """Redoes some rows by autodiff of other batches, at the live parameters.

        error = max_r | dots[r] - w[r] (< g[r], direction > - shared) | / max_i | dots[i] |
        g[r] = d loss_fn(params, batch[r : r + 1]) / d params

    It shares no code with what it audits. The loss must be a mean over rows, of any weights w[r]
    with mean 1, plus terms that belong to no row and do not depend on the rows, as weight decay:

        loss_fn(params, batch) = mean_r( w[r] l[r] ) + shared term

    where a batch of some of the rows has the same weights but for their mean. So it is for the sum
    of masked losses over the sum of the mask.

    Args:
      loss_fn: takes batches of any number of rows, and gives a row the same loss in each. Without
        ``row_weights``, of B + B/4 rows as well.
      params: at which the dots were made.
      batch: tree of arrays [B, ...].
      direction: a tree like ``params``, that of the dots.
      dots: [B], the sum over the parameters, as ``result.total()`` gives it.
      rows: [n] integers, which rows to redo.
      shared: ``result.shared``: a tree of scalars, of which the sum is taken. By default there is
        no such term, or it is what the dots lack of the gradient of the batch, whichever fits
        better; but there is none where one row has all the weight, as in a batch of one. So an
        error that is the same in all rows is left to ``conservation_error``.
      row_weights: [B], the w: ones for a mean, ``B * mask / sum(mask)`` for a masked one. By
        default they are found by leaving row r out of the batch and putting it in several times,
        which takes two gradients of the batch for each r. They are 1 where that does not tell:
        where the gradient of row r is that of the other rows; and where the loss is no such mean,
        which then shows as an error, unless the dots are those of row r's own loss.
      args, kwargs: passed on to ``loss_fn``.

    Returns:
      float32 scalar; infinite where a number that is not finite leaves nothing to compare. A row
      of weight 0 may have a loss that is not finite.

    With a sum over rows, and dots of ``loss_reduction="sum"``, give ``shared`` and ones as
    ``row_weights``.

    >>> import jax, jax.numpy as jnp
    >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w, x = jnp.ones(2), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> audit(loss_fn, w, x, direction=w, dots=jnp.array([2.0, 9.0]), rows=jnp.array([1])).round(3)
    Array(0.5, dtype=float32)
    """
    count = dots.shape[0]
    batch = jax.tree.map(jnp.asarray, batch)

    def gradient(*chosen):
        """Of a batch of the rows with these numbers."""
        part = jax.tree.map(lambda leaf: leaf[jnp.concatenate(chosen)], batch)
        grads = jax.grad(loss_fn)(params, part, *args, **kwargs)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)

    def redo(row):
        single = gradient(row[None])
        if row_weights is not None:
            weight = row_weights[row].astype(jnp.float32)
        elif count == 1:  # there are no others
            weight = jnp.float32(1)
        else:
            others = jnp.arange(count - 1)
            others = jnp.where(others < row, others, others + 1).astype(row.dtype)
            copies = jnp.full(-(-count // 4), row)
            rest, mixed = gradient(others), gradient(others, copies)
            weight = _weight(single, rest, mixed, copies.size, count)
        return inner_product(single, direction), weight

    own, weights = jax.lax.map(redo, rows)

    def error(shared, seen=1.0):
        expected = jnp.where(weights == 0, 0, weights * (own - shared))
        size = jnp.maximum(jnp.max(jnp.abs(dots)), jnp.max(jnp.abs(expected)))
        difference = jnp.max(jnp.abs(dots[rows] - expected) / seen)
        error = difference / jnp.where(size > 0, size, 1)
        # Not NaN, which is below every tolerance and stands for "no audit" in a log.
        return jnp.where(jnp.isnan(error), jnp.inf, error).astype(jnp.float32)

    if shared is not None:
        return error(sum(jnp.float32(leaf) for leaf in jax.tree.leaves(shared)))
    whole = inner_product(jax.grad(loss_fn)(params, batch, *args, **kwargs), direction)
    # A wrong dot is in their mean as well, which makes up for so much of it.
    seen = 1 - weights / count
    return jnp.minimum(error(0), error(whole - jnp.mean(dots), seen))


def _weight(single: Any, rest: Any, mixed: Any, copies: int, count: int) -> jax.Array:
    """The weight of a row, by the gradients of it, of the other rows, and of these and some copies
    of it, as

        mixed = part * single + (1 - part) * rest
        part = copies * share / (1 - share + copies * share),  share = weight / count

    1 where that does not tell.
    """
    trees = single, rest, mixed
    sizes = [
        jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)])
        for tree in trees
    ]
    has_single, has_rest, has_mixed = (jnp.isfinite(size).all() for size in sizes)
    largest = jnp.max(jnp.nan_to_num(jnp.stack(sizes), posinf=0))
    # Their squares may be zero in float32.
    single, rest, mixed = (
        jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0, largest, 1), tree) for tree in trees
    )
    apart = jax.tree.map(jnp.subtract, single, rest)
    moved = jax.tree.map(jnp.subtract, mixed, rest)
    distance = inner_product(apart, apart)
    part = jnp.clip(inner_product(moved, apart) / distance, 0, 1)
    beside = jax.tree.map(lambda there, way: there - part * way, moved, apart)
    is_clear = (distance > 1e-6 * (inner_product(single, single) + inner_product(rest, rest))) & (
        inner_product(beside, beside) <= MAX_AUDIT_ERROR**2 * distance
    )
    weight = jnp.where(is_clear, count * part / (copies * (1 - part) + part), 1)
    # 0 / 0, where a mask leaves nothing of the row or of the others.
    is_out = (
        has_rest & has_mixed & (inner_product(moved, moved) <= 1e-4 * inner_product(rest, rest))
    )
    weight = jnp.where(~has_single & is_out, 0, weight)
    return jnp.where(has_single & has_mixed & ~has_rest, count, weight)


def inner_product(first: Any, second: Any) -> jax.Array:
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), first, second
    )
    return sum(jax.tree.leaves(products))
