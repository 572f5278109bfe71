"""squared_norms and value_and_clipped_grad: per-example gradients by their size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ghostjax._face import on_loss
from ghostjax._loss import Arrays, Loss
from ghostjax._row_gradients import clipping_pass, row_pass, trace_rows
from ghostjax.core import Labels


def squared_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
) -> Callable[..., Any]:
    """The squared norm of every row's gradient, parameter by parameter.

        squared_norms(loss_fn)(params, batch)[p][i] = | d l_i / d p |^2

    for any JAX function. Parameters that are used several times, tied or repeated, have the cross
    terms of their uses in it. The norm of a row's whole gradient is the root of the sum over p,
    ``jnp.sqrt(aggregate(norms))``.

    Args:
      loss_fn: ``loss_fn(params, batch, ...)`` gives the loss, a scalar; or the losses of all rows,
        [N], and then ``loss_reduction`` says nothing.
      argnums, batch_argnums, has_aux, per_example, loss_reduction: as for ``value_grad_and_dots``.
        "mean": l_i is row i's own loss, N times its share; "sum": l_i is row i's share.

    Returns:
      ``fn(*args, labels=None, num_labels=None, **kwargs)`` -> a tree of the parameters, every leaf
      [N] in float32 (float64 for float64 parameters). With labels, as for ``value_grad_and_dots``,
      [S]: the norms of the examples' gradients. NaN where gradient flows through places of several
      examples at once.

    Guarantees: one forward and one backward pass. Where static shapes say that it costs less, norms
    come from pairs of a row's positions: of matrix products and look-ups, of a matrix that is used
    several times too. Else one row's gradient, or a few of a convolution's, is formed at a time.
    ``explain`` tells which, and the cost.
    What belongs to no row, such as weight decay inside the loss, is in no row's norm.

    Raises:
      What ``value_grad_and_dots`` raises.

    >>> import jax.numpy as jnp
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> squared_norms(lambda w, x: jnp.mean(jnp.square(x @ w) / 2))(w, x)
    Array([ 1., 45.], dtype=float32)

    Source: Goodfellow, Efficient Per-Example Gradient Computations, arXiv:1510.01799; over pairs of
    positions: Li et al., arXiv:2110.05679.
    """

    def run(loss: Loss, arrays: Arrays, labels: Labels | None) -> Any:
        return row_pass(loss, arrays, labels, at_once=True).squared_norms()

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


def value_and_clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: Any,
    *,
    weights: Any = None,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad``, with every row's gradient clipped before they are added up.

        value, grads = value_and_clipped_grad(loss_fn, C)(params, batch)
        grads = 1/N sum_i w_i g_i min(1, C / |g_i|),     g_i = d l_i / d params

    ("sum": without the 1/N), for any JAX function. No noise is added: that is for optax or
    jax_privacy, and so is the accounting.

    Args:
      loss_fn, argnums, batch_argnums, has_aux, per_example, loss_reduction: as for
        ``squared_norms``. A loss that gives [N] is added up, its value and gradient are sums.
      max_norm: C > 0, the largest norm of a row's gradient over all parameters; may be traced.
      weights: w >= 0, [N], floats or booleans: 0 for padding, whose gradient then does not count
        whatever it is (but NaN makes ``grads`` NaN in a function whose own backward rule adds up
        rows in loops, moves them or uses statistics of all of them). Rows are still N. With labels
        [S], of examples. Weights above 1 make the sensitivity C times the largest.

    Returns:
      ``fn(*args, labels=None, num_labels=None, **kwargs) -> (value, grads)``, or
      ``((value, aux), grads)`` with ``has_aux``. ``value`` is that of ``loss_fn``, without weights.
      With labels the gradients of examples are clipped, those of a user's rows for one.

    Guarantees: a forward and a backward pass for the norms, as in ``squared_norms``, and another
    backward pass in which every row has its weight. A row's gradient that is zero stays so; one
    whose square is not finite makes ``grads`` NaN, and so do traced weights that are negative or
    NaN, and a traced ``max_norm`` that is not positive.

    Raises:
      ValueError: ``max_norm`` is not positive, weights do not fit or are known to be negative or
        NaN, or a parameter's gradient belongs to no row, as that of weight decay inside the loss.
      NotImplementedError: the result is differentiated by the parameters.
      What ``value_grad_and_dots`` raises.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.sum(x @ w)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[3.0, 4.0], [0.0, 0.5]])
    >>> value_and_clipped_grad(loss_fn, 1.0, loss_reduction="sum")(w, x)
    (Array(7.5, dtype=float32), Array([0.6, 1.3], dtype=float32))

    Source: Lee and Kifer, arXiv:2009.03106 (two passes); Li et al., arXiv:2110.05679.
    """
    if not isinstance(max_norm, jax.core.Tracer) and not (jnp.ndim(max_norm) == 0 and max_norm > 0):
        raise ValueError(f"max_norm must be a positive number, got {max_norm}.")

    def run(loss: Loss, arrays: Arrays, labels: Labels | None) -> tuple[Any, Any]:
        left, weighted = clipping_pass(loss, arrays, labels, at_once=True)
        total = sum(jax.tree.leaves(left.squared_norms()), jnp.zeros(left.examples))
        largest = jnp.where(max_norm > 0, max_norm, jnp.nan)
        own = jnp.minimum(1, largest * jax.lax.rsqrt(jnp.where(total == 0, 1, total)))
        own = jnp.where(total == 0, 1, jnp.where(jnp.isfinite(total), own, jnp.nan))
        own = jnp.where(jnp.isnan(largest), jnp.nan, own)
        if weights is not None:
            own = _weighted(own, weights)
        if labels is not None and labels.ids.ndim == 1:
            is_own = (labels.ids >= 0) & (labels.ids < labels.count)
            own = jnp.where(is_own, _taken(own, jnp.clip(labels.ids, 0, labels.count - 1)), 0)
        value = (left.value, left.aux) if has_aux else left.value
        grads = jax.tree.unflatten(loss.params, weighted(own))
        return _undifferentiated((value, grads), arrays.params)

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


@jax.custom_jvp
def _undifferentiated(result: Any, params: list[Any]) -> Any:
    """``result``; an error where it is to be differentiated by ``params``."""
    del params
    return result


def _derivative(primals, tangents):
    if not all(map(_is_symbolic, tangents[1])):
        raise NotImplementedError(
            "what value_and_clipped_grad returns cannot be differentiated by the parameters, which "
            "are constants in its pass. Clip the gradients of jax.vmap(jax.grad(...)) instead, or "
            "stop_gradient the parameters that go in."
        )
    return primals[0], tangents[0]


def _is_symbolic(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


_undifferentiated.defjvp(_derivative, symbolic_zeros=True)


def _taken(array: jax.Array, ids: jax.Array) -> jax.Array:
    """``array[ids]``, placed like the numbers where explicit axes of a mesh split them."""
    placed = jax.typeof(ids).sharding
    is_split = any(names is not None for names in placed.spec)
    return array.at[ids].get(out_sharding=placed if is_split else None)


def _weighted(own: jax.Array, weights: Any) -> jax.Array:
    dtype = jnp.result_type(weights)
    is_number = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.floating))
    if jnp.shape(weights) != own.shape or not is_number:
        raise ValueError(
            f"weights must be floats or booleans, one for each of the {own.size} examples. Found "
            f"{dtype}{list(jnp.shape(weights))}."
        )
    if not isinstance(weights, jax.core.Tracer) and not np.all(np.asarray(weights) >= 0):
        raise ValueError(f"weights must not be negative or NaN, got {weights}.")
    weights = jnp.asarray(weights).astype(own.dtype)
    weights = jnp.where(weights >= 0, weights, jnp.nan)
    return jnp.where(weights == 0, 0, own * weights)
