"""The derivative of an optimizer's update, transposed: how scores go through the optimizer."""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from ghostjax._checks import check_direction
from ghostjax._jaxprs import inner_jaxprs, value_in
from ghostjax._scalars import evaluate


def through_and_undefined(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, grads: Any, **extra_args: Any
) -> tuple[Callable[[Any], Any], jax.Array]:
    """What ``through_optimizer`` makes of one ``val_grads``, and ``count_undefined``.

    They have most of their work in common, which is traced once here.
    """
    check_direction(params, grads, "grads")
    _warn_of_micro_steps(opt_state)
    update, forward = _traced(_update_function(tx, opt_state, params, extra_args), grads)
    closed = jax.make_jaxpr(lambda grads: _undefined(update, grads))(grads)
    treedef = jax.tree.structure(params)
    undefined = treedef.unflatten(evaluate(closed, jax.tree.leaves(grads)))

    def direction(grads, undefined, val_grads):
        updates, pull_back = jax.vjp(update, jax.tree.map(_away_from_zero, grads))
        cotangents = jax.tree.map(
            lambda leaf, is_undefined, like: jnp.where(is_undefined, 0, -leaf).astype(like.dtype),
            val_grads,
            undefined,
            updates,
        )
        return jax.tree.map(
            lambda leaf, is_undefined: jnp.where(is_undefined, 0, leaf),
            pull_back(cotangents)[0],
            undefined,
        )

    closed = jax.make_jaxpr(direction)(grads, undefined, params)
    _check_derivative(forward.jaxpr, closed.jaxpr, grads)

    def evaluated(val_grads):
        return treedef.unflatten(evaluate(closed, jax.tree.leaves((grads, undefined, val_grads))))

    return evaluated, _count(undefined)


def number_undefined(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, grads: Any, **extra_args: Any
) -> jax.Array:
    """``count_undefined`` alone."""
    update = _update_function(tx, opt_state, params, extra_args)
    closed = jax.make_jaxpr(lambda grads: _undefined(update, grads))(grads)
    return _count(evaluate(closed, jax.tree.leaves(grads)))


def _warn_of_micro_steps(opt_state: Any) -> None:
    """``optax.MultiSteps`` in an optimizer's state: most of its steps do not update."""

    def gathers(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    if any(map(gathers, jax.tree.leaves(opt_state, is_leaf=gathers))):
        warnings.warn(
            "optax.MultiSteps: micro-steps that gather gradients and do not update have direction "
            "zero, so all of their rows score 0; differentiate the whole batch in one step, in "
            "parts where memory is short, to score every row.",
            stacklevel=4,
        )


def _update_function(tx, opt_state, params, extra_args):
    tx = optax.with_extra_args_support(tx)

    def update(grads):
        return tx.update(grads, opt_state, params, **extra_args)[0]

    return update


def _traced(update: Callable[[Any], Any], grads: Any) -> tuple[Any, core.ClosedJaxpr]:
    """The same function and its jaxpr: optax is slow to trace, and traced once."""
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(grads)
    treedef = jax.tree.structure(shapes)

    def traced(grads):
        return treedef.unflatten(evaluate(closed, jax.tree.leaves(grads), math.inf))

    return traced, closed


def _smallest(dtype: Any) -> Any:
    """Well below any gradient that matters, and yet its square is not rounded to zero."""
    if dtype == jnp.float16:  # of so small a range that the cube root is 0.04
        return jnp.asarray(2.0**-11, dtype)
    return jnp.asarray(float(jnp.finfo(dtype).tiny) ** (1 / 3), dtype)


def _away_from_zero(leaf: jax.Array) -> jax.Array:
    """One NaN from a square root at zero would spread to all coordinates through a global norm."""
    smallest = _smallest(leaf.dtype)
    return jnp.where(jnp.abs(leaf) < smallest, jnp.where(leaf < 0, -smallest, smallest), leaf)


def _undefined(update: Callable[[Any], Any], grads: Any) -> Any:
    """Per coordinate of the update: near a gradient of zero, and without a finite derivative."""
    is_small = jax.tree.map(lambda leaf: jnp.abs(leaf) < _smallest(leaf.dtype), grads)
    moving = jax.tree.map(lambda leaf, small: small.astype(leaf.dtype), grads, is_small)
    tangents = jax.jvp(update, (grads,), (moving,))[1]
    return jax.tree.map(lambda small, tangent: small & ~jnp.isfinite(tangent), is_small, tangents)


def _count(undefined: Any) -> jax.Array:
    return sum(jnp.sum(leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(undefined))


def _check_derivative(forward: core.Jaxpr, direction: core.Jaxpr, grads: Any) -> None:
    """Every gradient that the update uses must have a derivative that is not zero by its form."""
    count = len(forward.invars)
    each = [1 << position for position in range(count)]
    used = _dependence(forward, each)
    # Its arguments: gradients, which of them are undefined, and what is pulled back.
    derivatives = _dependence(direction, [0] * 2 * count + [1] * count)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    faults = [
        f"  {jax.tree_util.keystr(path) or 'params'}"
        for (path, leaf), own, uses, derivative in zip(leaves, each, used, derivatives)
        if own & uses and not derivative and leaf.size  # of no elements, JAX makes it a constant
    ]
    if faults:
        raise ValueError(
            "the optimizer's update has derivative zero with respect to the gradients of\n"
            + "\n".join(faults)
            + "\nalthough it uses them: it is made of their signs or the like, so that no "
            "first-order score goes through it. Use the validation gradient itself as the "
            "direction, or go through a smooth optimizer close to this one (optax.adam for "
            "optax.lion)."
        )


def _dependence(jaxpr: core.Jaxpr, seeds: Sequence[int]) -> list[int]:
    """For every output, the union (as bits) of the seeds of the inputs it depends on.

    Whether a gradient is finite is no use of its value.
    """
    bits = dict(zip(jaxpr.invars, seeds))
    for eqn in jaxpr.eqns:
        operands = [value_in(bits, atom, 0) for atom in eqn.invars]
        inner = inner_jaxprs(eqn)
        if eqn.primitive.name == "jit":
            outputs = _dependence(inner[0][0], operands)
        else:
            every = functools.reduce(operator.or_, operands, 0)
            outputs = [0 if eqn.primitive.name == "is_finite" else every] * len(eqn.outvars)
        bits.update(zip(eqn.outvars, outputs))
    return [value_in(bits, atom, 0) for atom in jaxpr.outvars]
