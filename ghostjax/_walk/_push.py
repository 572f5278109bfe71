"""The walk through parameters alone: what a direction is at every meeting."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._walk._meeting import push_forward
from ghostjax._walk._values import paths_of
from ghostjax._walk._walk import Walk


class Push(Walk):
    """Emits, by meeting and parameter, the direction at the operands that depend on it.

    What depends on the batch is not computed. It stands outside of the differentiation of the loss:
    what makes parameters into others need not have a second derivative.
    """

    computes_data = False

    def __init__(self, names, num_rows, stacked: bool, named_meetings=None):
        super().__init__(names, num_rows, named_meetings)
        self.stacked = stacked

    def pushed(self, eqn, function, operands, outputs):
        found: list[dict[int, Any]] = [{} for _ in outputs]
        for path in paths_of(operands):
            moved = push_forward(function, operands, path, self.stacked)
            for tangents, tangent in zip(found, moved):
                if tangent is not None:
                    tangents[path] = tangent
        return found

    def zero_tangent(self, primal, like):
        leading = like.shape[: like.ndim - primal.ndim]
        return jnp.zeros((*leading, *primal.shape), primal.dtype)

    def meet(self, eqn, function, operands, outputs, rows):
        self.emitted[self.next_key()] = {
            path: [value.tangents[path] for value in operands if path in value.tangents]
            for path in paths_of(operands)
        }
        return [self.data(None, True, info) for info in rows]
