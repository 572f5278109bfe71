"""The channel: an identity that carries results out of the backward pass.

All of these are for the differentiation that makes the gradient. Where its results are themselves
differentiated, that sees what the values depend on, as it would not with ``stop_gradient``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from ghostjax.core.types import zeros_of_type


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def channel(backward: Callable[[Any, Any], Any], outputs: Any, carried: Any, residuals: Any) -> Any:
    """Returns ``outputs``; in the backward pass, ``backward`` decides what ``carried`` gets.

    The cotangents of ``outputs`` pass through untouched, so that whatever lies before sees exactly
    the gradient it would have seen. ``residuals`` get none.

    Args:
      backward: ``backward(residuals, cotangents)`` returns a tree like ``carried``. It must not
        close over traced values: those belong into ``residuals``.
      outputs: tree of inexact arrays.
      carried: tree of arrays whose cotangents ``backward`` makes; their values are not read.
      residuals: what ``backward`` needs from the forward pass.
    """
    del backward, carried, residuals
    return outputs


def _forward(backward, outputs, carried, residuals):
    del backward, carried
    return primals(outputs), primals(residuals)


def _backward(backward, residuals, cotangents):
    return passed_on(cotangents), backward(residuals, _arrays(cotangents)), None


def primals(tree: Any) -> Any:
    """The arrays in what a forward rule with ``symbolic_zeros`` is given."""
    return jax.tree.map(lambda own: own.value, tree, is_leaf=lambda own: hasattr(own, "perturbed"))


def passed_on(cotangents: Any) -> Any:
    """The cotangents with None for those that are zero for sure.

    JAX has rules that want to know: of outputs that all rows share, ``custom_vjp`` takes none but
    such cotangents under ``jax.vmap``.
    """
    return jax.tree.map(lambda c: None if _is_zero(c) else c, cotangents, is_leaf=_is_zero)


def _arrays(cotangents):
    return jax.tree.map(
        lambda c: zeros_of_type(c.aval) if _is_zero(c) else c, cotangents, is_leaf=_is_zero
    )


def _is_zero(cotangent):
    return isinstance(cotangent, SymbolicZero)


channel.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def set_aside(values: Any, differentiated: Any) -> Any:
    """``values``, for use outside: no gradient passes.

    ``differentiated`` is what the gradient is taken of, among others: by it this differentiation,
    and not one around it, is the first that comes by.
    """
    del differentiated
    return values


set_aside.defvjp(lambda values, _: (values, None), lambda _, cotangents: (None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def all_but_one(
    function: Callable[[Sequence[Any]], Any], position: int, operands: Sequence[Any]
) -> Any:
    """``function`` of the operands; the one at ``position`` gets its gradient elsewhere."""
    return function(operands)


def _all_but_one_backward(function, position, operands, cotangents):
    others = [*operands[:position], *operands[position + 1 :]]

    def of_others(others):
        return function([*others[:position], operands[position], *others[position:]])

    (gradients,) = jax.vjp(of_others, others)[1](cotangents)
    return ([*gradients[:position], None, *gradients[position:]],)


all_but_one.defvjp(
    lambda function, position, operands: (function(operands), operands), _all_but_one_backward
)
