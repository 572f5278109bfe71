"""The walk through parameters alone: what a direction is at every meeting."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._jaxprs import is_inexact
from ghostjax.core.lookups import promises
from ghostjax.core.meeting import TangentProgram, tangents_of
from ghostjax.core.types import zeros_of
from ghostjax.core.values import paths_of
from ghostjax.core.walk import Walk

# By primitive of parameters alone: ``(eqn, primals, moving, name) -> push``, where forward mode
# does not serve.
PUSHES: dict[str, Callable[..., Any]] = {}


class Push(Walk):
    """Emits, by meeting and parameter, the direction at the operands that depend on it.

    What depends on the batch is not computed. It stands outside of the differentiation of the loss:
    what makes parameters into others need not have a second derivative.
    """

    computes_data = False
    checks_rows = False

    def __init__(self, names, num_rows, stacked: bool, named_meetings=None):
        super().__init__(names, num_rows, named_meetings)
        self.stacked = stacked

    def pushed(self, eqn, function, operands, outputs):
        found: list[dict[int, Any]] = [{} for _ in outputs]
        primals = [value.primal for value in operands]
        for path in paths_of(operands):
            moving = [k for k, value in enumerate(operands) if path in value.tangents]
            if eqn.primitive.name in PUSHES:
                push = PUSHES[eqn.primitive.name](eqn, primals, moving, self.names[path])
            elif promises(eqn):
                push = TangentProgram(function, primals, moving).at(primals)
            else:
                push = functools.partial(tangents_of, function, primals, moving)
            inexact = [k for k, output in enumerate(outputs) if is_inexact(output)]

            def dense(vectors, push=push, inexact=inexact):
                tangents = push(vectors)
                return [tangents[k] for k in inexact]

            vectors = [operands[position].tangents[path] for position in moving]
            moved = jax.vmap(dense)(vectors) if self.stacked else dense(vectors)
            for position, tangent in zip(inexact, moved):
                found[position][path] = tangent
        return found

    def zero_tangent(self, primal, like):
        leading = like.shape[: like.ndim - primal.ndim]
        return jnp.broadcast_to(zeros_of(primal), (*leading, *primal.shape))

    def meet(self, eqn, function, operands, outputs, places):
        self.emitted[self.next_key()] = {
            path: [value.tangents[path] for value in operands if path in value.tangents]
            for path in paths_of(operands)
        }
        return [self.data(None, True, where) for where in places]
