"""The channel: an identity that carries results out of the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax


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
    return outputs, residuals


def _backward(backward, residuals, cotangents):
    return cotangents, backward(residuals, cotangents), None


channel.defvjp(_forward, _backward)
