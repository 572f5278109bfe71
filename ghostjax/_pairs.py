"""pairwise_dots: inner products of rows' gradients with each other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._checks import check_val_batch_size
from ghostjax._face import on_loss
from ghostjax._labels import or_nan
from ghostjax._loss import Arrays, Loss
from ghostjax._row_gradients import row_pass, trace_rows
from ghostjax.core import Labels

# Of the rows' gradients that are in memory at a time, in bytes; one is always.
BUDGET = 2**28


def pairwise_dots(
    loss_fn: Callable[..., Any],
    *,
    val_batch_size: int | None = None,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
    budget: int = BUDGET,
) -> Callable[..., Any]:
    """The inner products of every training row's gradient with every validation row's.

        pairwise_dots(loss_fn, val_batch_size=V)(params, batch)[p][i, v]
            = < d l_i / d p , d l_{B + v} / d p >,         i < B = N - V,  v < V

    parameter by parameter, for any JAX function; without ``val_batch_size`` the Gram matrix [N, N]
    of all rows. Summed over v they are V times the dots of ``GradDotProdEngine``, and the Gram
    matrix has ``squared_norms`` on its diagonal.

    Args:
      loss_fn, argnums, batch_argnums, has_aux, per_example, loss_reduction: as for
        ``squared_norms``.
      val_batch_size: V, the number of validation rows at the end of the batch.
      budget: how many bytes the gradients of validation rows may take that are formed at a time.

    Returns:
      ``fn(*args, labels=None, num_labels=None, **kwargs)`` -> a tree of the parameters, every leaf
      [B, V] or [N, N], in float32 (float64 for float64 parameters). With labels, as for
      ``value_grad_and_dots`` and without ``val_batch_size``, the Gram matrix [S, S] of examples.

    Guarantees: one forward and one backward pass, whose factors are kept. As many gradients of
    validation rows as the budget allows, at least one, are formed at a time, and multiplied with
    all rows' factors at once.

    Raises:
      BatchError: ``val_batch_size`` leaves no training row.
      What ``value_grad_and_dots`` raises.

    >>> import jax.numpy as jnp
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> pairwise_dots(lambda w, x: jnp.mean(jnp.square(x @ w) / 2))(w, x)
    Array([[ 1.,  3.],
           [ 3., 45.]], dtype=float32)

    Source: GREATS, Wang et al. 2024, for what they are good for.
    """
    if val_batch_size is not None:
        check_val_batch_size(val_batch_size)
    if budget < 1:
        raise ValueError(f"budget must be a positive number of bytes, got {budget}.")

    def run(loss: Loss, arrays: Arrays, labels: Labels | None) -> Any:
        rows = loss.num_rows if labels is None else labels.count
        train = 0
        if val_batch_size is not None:
            if labels is not None:
                raise ValueError(
                    "labels number the examples of the whole batch, and val_batch_size its last "
                    "rows. Leave out val_batch_size, and take a part of the Gram matrix [S, S]."
                )
            train = rows - check_val_batch_size(val_batch_size, rows)
        left = row_pass(loss, arrays, labels, at_once=False)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.params)
        block = max(1, min(rows - train, budget // max(size, 1)))

        def of_block(numbers):
            gradients = jax.lax.map(left.gradient, numbers)
            return left.dots(gradients, block)

        blocks = math.ceil((rows - train) / block)
        numbers = jnp.minimum(train + jnp.arange(blocks * block), rows - 1).reshape(blocks, block)
        scale, count = loss.scale**2, rows - train
        leaves = [
            leaf.reshape(blocks * block, rows)[:count, : train or rows].T * scale
            for leaf in jax.lax.map(of_block, numbers)
        ]
        return jax.tree.unflatten(loss.params, or_nan(leaves, left.conflicts))

    return on_loss(
        loss_fn,
        run,
        trace=trace_rows,
        argnums=argnums,
        batch_argnums=batch_argnums,
        has_aux=has_aux,
        per_example=per_example,
        loss_reduction=loss_reduction,
    )
