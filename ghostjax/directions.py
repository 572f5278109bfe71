"""Directions: what to multiply every row's gradient with, so that the product is an answer.

Dots are linear in their direction, so every score is a choice of it. All directions here point the
same way: positive dots belong to rows that lower the validation loss.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ghostjax._checks import check_direction, check_parameters
from ghostjax._dtypes import wide_dtype
from ghostjax._through import number_undefined, through_and_undefined


def through_optimizer(
    tx: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    grads: Any,
    val_grads: Any,
    **extra_args: Any,
) -> Any:
    """The direction that tells what a row's gradient does after the optimizer has worked on it.

        v = - (d update / d grads)^T val_grads,      update = tx.update(grads, opt_state, params)[0]

    With per-row dots < g_i, v > and ``grads`` the mean of g_1 ... g_B, ``dots[i] / B`` is the
    first-order decrease of the validation loss, in its own unit, caused by row i's share of the
    update: learning rate, schedule, moments and clipping are in it. For ``optax.sgd(lr)`` v is
    ``lr * val_grads``.

    Args:
      tx: any optax transformation whose update has a useful derivative.
      opt_state: the state that the update of this step starts from.
      params: to which the update will be added.
      grads: where the update is linearised: the gradient that the step takes, as
        ``value_and_dots_fn`` gives it before it needs the direction.
      val_grads: gradient of the mean validation loss, or what ``midpoint`` or ``look_ahead``
        give; a tree like ``params``, or with a leading axis K on every leaf, of K such gradients.
      extra_args: passed on to ``tx.update``.

    Returns:
      A tree like ``params``, in its dtypes; with the leading axis K of stacked ``val_grads``.

    Guarantees: finite where its arguments are. Where gradient and second moment are both zero, as
    for a token that has not occurred yet, Adam's update has no finite derivative: such a coordinate
    of the update counts as a constant, and ``count_undefined`` says how many there are. (An
    optimizer that computes NaN in a branch it does not take gives NaN all the same: optax.radam in
    its first five steps.) Adam's first step is the sign of the gradient but for its epsilon, so
    that in float32 its derivative is little more than rounding: scores begin to mean something at
    the second step. Only the update of this step counts, not what the state hands on to later ones:
    where ``optax.MultiSteps`` gathers gradients and does not update, the direction is zero; a
    warning says so.

    Raises:
      ValueError: ``grads`` or ``val_grads`` is not like ``params``; or the update of a parameter
        uses its gradient, but has no derivative with respect to it (sign-based updates, such as
        lion's).

    >>> import jax.numpy as jnp, optax
    >>> params, grads, val_grads = jnp.ones(2), jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    >>> through_optimizer(tx, tx.init(params), params, grads, val_grads)
    Array([ 0.064, -0.048], dtype=float32)

    Source: Data Shapley in One Training Run, arXiv:2406.11011, takes the update to be that of SGD;
    here its derivative is that of the optimizer at hand.
    """
    stacked = check_direction(params, val_grads, "val_grads", stacked=True) is not None
    evaluated, _ = through_and_undefined(tx, opt_state, params, grads, **extra_args)
    return (jax.vmap(evaluated) if stacked else evaluated)(val_grads)


def count_undefined(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, grads: Any, **extra_args: Any
) -> jax.Array:
    """How many coordinates of the update ``through_optimizer`` takes to be constant.

    They are those that have no finite derivative at ``grads`` and a gradient of zero, or so close
    to zero that its square is. Where the transformation ties coordinates together after such a
    division (clipping *after* Adam), all coordinates with a gradient of zero count.

    Args:
      tx, opt_state, params, grads, extra_args: as for ``through_optimizer``.

    Returns:
      int32 scalar.

    >>> import jax.numpy as jnp, optax
    >>> params, grads = jnp.ones(3), jnp.array([0.5, 0.0, 0.0])
    >>> tx = optax.rmsprop(1e-3, eps_in_sqrt=False)
    >>> count_undefined(tx, tx.init(params), params, grads)
    Array(2, dtype=int32)
    """
    return number_undefined(tx, opt_state, params, grads, **extra_args)


def midpoint(
    loss_fn: Callable[..., Any],
    params: Any,
    updates: Any,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """The gradient of the validation loss half-way along the update.

        v = d loss_fn / d params   at   params + updates / 2
        loss_fn(params) - loss_fn(params + updates) = - < v, updates > + O(|updates|^3)

    The prediction is right to second order, for one gradient and no Hessian-vector product. If the
    loss is quadratic in the parameters, nothing remains. Through plain ``optax.sgd``, whose update
    is the sum of the rows' shares, scores then add up to the actual decrease, and they are the
    rows' Shapley values: interactions are shared out equally. To leave one row out, see
    ``look_ahead``.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs) -> scalar``, the mean validation loss.
      params: where the update begins.
      updates: what will be added to ``params``, such as the updates of optax; of any floating-point
        dtypes.
      has_aux: whether ``loss_fn`` gives ``(scalar, aux)``, such as the rows' own losses there.
      args, kwargs: passed on to ``loss_fn``.

    Returns:
      A tree like ``params``, in its dtypes, to be used like ``val_grads``: in
      ``through_optimizer``, or times the learning rate as a direction of its own. With ``has_aux``,
      ``(tree, aux)``.

    Guarantees: the point is summed in float32 (float64, where either summand is) and rounded to the
    dtypes of ``params`` once, as ``optax.apply_updates`` would round it; in bfloat16, a parameter
    stays where it is if half its update is less than half a unit in its last place. v is a gradient
    that the loss really has, never an extrapolation that grows with the curvature.

    Raises:
      ValueError: ``updates`` has not the tree and shapes of ``params``.
      TypeError: a parameter is not a real floating-point array.

    >>> import jax.numpy as jnp
    >>> loss_fn = lambda x: jnp.sum(x**2) / 2
    >>> params, updates = jnp.array([1.0, 2.0]), jnp.array([-0.5, 0.0])
    >>> v = midpoint(loss_fn, params, updates)
    >>> v, -v @ updates, loss_fn(params) - loss_fn(params + updates)
    (Array([0.75, 2.  ], dtype=float32), Array(0.375, dtype=float32), Array(0.375, dtype=float32))

    Source: arXiv:2406.11011, section 4.2 (second-order In-Run Data Shapley) has
    ``val_grads + 1/2 H updates``, the Taylor series of this gradient cut off. It is the same for a
    quadratic loss, and can be far too large where curvature is high.
    """
    return jax.grad(loss_fn, has_aux=has_aux)(_along(params, updates, 0.5), *args, **kwargs)


def look_ahead(
    loss_fn: Callable[..., Any],
    params: Any,
    updates: Any,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """The gradient of the validation loss where the update leads.

        v = d loss_fn / d params   at   params + updates

    It tells what taking one row out of the update changes, when all others stay in it.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs) -> scalar``, the mean validation loss.
      params: where the update begins.
      updates: what will be added to ``params``.
      has_aux: whether ``loss_fn`` gives ``(scalar, aux)``.
      args, kwargs: passed on to ``loss_fn``.

    Returns:
      A tree like ``params``, in its dtypes, to be used like ``val_grads``. With ``has_aux``,
      ``(tree, aux)``.

    Guarantees: the point is that of ``optax.apply_updates``, bit for bit.

    Raises:
      ValueError: ``updates`` has not the tree and shapes of ``params``.
      TypeError: a parameter is not a real floating-point array.

    >>> import jax.numpy as jnp
    >>> loss_fn = lambda x: jnp.sum(x**2) / 2
    >>> look_ahead(loss_fn, jnp.array([1.0, 2.0]), jnp.array([-0.5, 0.0]))
    Array([0.5, 2. ], dtype=float32)
    """
    return jax.grad(loss_fn, has_aux=has_aux)(_along(params, updates, 1.0), *args, **kwargs)


def stacked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn = value_grad_and_dots(...)`` for code that relies on K directions, one of them or more.

        dots[p][k, i] = < d l_i / d p , direction[p][k] >

    Args:
      fn: takes stacked directions itself; but a single one, too, and then its dots are [B].

    Returns:
      A function like ``fn``, whose dots are [K, B].

    Raises:
      ValueError: ``direction`` has no leading axis K.

    >>> import jax.numpy as jnp
    >>> from ghostjax import value_grad_and_dots
    >>> fn = stacked(value_grad_and_dots(lambda w, x: jnp.mean(x @ w)))
    >>> result = fn(jnp.ones(2), jnp.eye(2), direction=jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> result.value, result.dots
    (Array(1., dtype=float32), Array([[1., 2.], [3., 4.]], dtype=float32))
    """

    @functools.wraps(fn)
    def over_directions(*args: Any, direction: Any, **kwargs: Any) -> Any:
        result = fn(*args, direction=direction, **kwargs)
        if {leaf.ndim for leaf in jax.tree.leaves(result.dots)} != {2}:
            raise ValueError(
                "direction must have a leading axis K on every leaf, of K directions. Found a "
                "single direction, with the shapes of the parameters."
            )
        return result

    return over_directions


def _along(params: Any, updates: Any, part: float) -> Any:
    """``params + part * updates``, in the dtypes of ``params``."""
    check_parameters(params)
    check_direction(params, updates, "updates", dtypes=False)

    def move(leaf, update):
        wide = wide_dtype(leaf, update)
        # Half an update is exact, so that the sum alone is rounded.
        moved = jnp.asarray(leaf, wide) + part * jnp.asarray(update, wide)
        return moved.astype(jnp.result_type(leaf))

    return jax.tree.map(move, params, updates)
