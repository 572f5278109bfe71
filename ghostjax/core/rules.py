"""The jaxpr of what a function with a derivative rule of its own does in a derivative."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ghostjax._jaxprs import bind, is_inexact
from ghostjax.core.program import Program, program_of


def pullback(eqn: Any, active: Sequence[bool], wanted: Sequence[bool]) -> Program:
    """(operands, cotangents of real or complex outputs) -> cotangents of the ``wanted`` operands.

    Differentiated by everything ``active``, as a rule may ask what is.
    """
    moving = [position for position, is_active in enumerate(active) if is_active]

    def pull_back(primals, cotangents):
        function = _of_moving(eqn, primals, moving)
        _, pull = jax.vjp(function, *(primals[position] for position in moving))
        remaining = iter(cotangents)
        return pull(
            [
                next(remaining) if is_inexact(var) else np.zeros(var.aval.shape, jax.dtypes.float0)
                for var in eqn.outvars
            ]
        )

    outputs = [var.aval for var in eqn.outvars if is_inexact(var)]
    closed = jax.make_jaxpr(pull_back)([atom.aval for atom in eqn.invars], outputs)
    return program_of(closed, [wanted[position] for position in moving])


def pushforward(eqn: Any, active: Sequence[bool], wanted: Sequence[bool]) -> Program:
    """(operands, tangents of the active ones) -> tangents of the ``wanted`` outputs."""
    moving = [position for position, is_active in enumerate(active) if is_active]

    def push_forward(primals, tangents):
        function = _of_moving(eqn, primals, moving)
        return jax.jvp(function, [primals[position] for position in moving], tangents)[1]

    avals = [atom.aval for atom in eqn.invars]
    closed = jax.make_jaxpr(push_forward)(avals, [avals[position] for position in moving])
    return program_of(closed, wanted)


def _of_moving(eqn: Any, primals: Sequence[Any], moving: Sequence[int]) -> Callable[..., list]:
    def function(*arrays):
        moved = list(primals)
        for position, array in zip(moving, arrays):
            moved[position] = array
        return bind(eqn, moved)

    return function
