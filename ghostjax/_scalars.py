"""Evaluating a jaxpr so that XLA computes each of its scalars once."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import bind, is_var, live_equations

MANY_USERS = 8


def evaluate(
    closed: core.ClosedJaxpr, operands: Sequence[Any], many_users: float = MANY_USERS
) -> list[Any]:
    """The outputs of a jaxpr, for the derivatives of functions of many parameters.

    XLA repeats cheap operations in the code of each of their users. A global norm ends in a square
    root, which is not cheap; but its derivative is a sum over all parameters times a scalar. That
    sum would stand in the code of every parameter: compile time would grow with the square of
    their number.
    """
    jaxpr = closed.jaxpr
    users = Counter(atom for eqn in jaxpr.eqns for atom in eqn.invars if is_var(atom))
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values = dict(zip(variables, (*closed.consts, *operands), strict=True))

    def read(atom):
        return values[atom] if is_var(atom) else atom.val

    needed, _ = live_equations(jaxpr, [True] * len(jaxpr.outvars))
    for eqn in needed:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "jit":  # calls cost more to trace than what they hold
            outputs = evaluate(eqn.params["jaxpr"], inputs, many_users)
        else:
            outputs = bind(eqn, inputs)
        for var, output in zip(eqn.outvars, outputs, strict=True):
            is_shared = users[var] >= many_users and not getattr(var.aval, "shape", None)
            if is_shared and jnp.issubdtype(var.aval.dtype, jnp.floating):
                output = _not_cheap(output)
            values[var] = output
    return [read(atom) for atom in jaxpr.outvars]


def _not_cheap(scalar: jax.Array) -> jax.Array:
    """The same value (but for subnormal numbers), divided by a one that XLA cannot know to be one.

    ``lax.optimization_barrier`` does not help: XLA's CPU backend drops it before it fuses.
    """
    return scalar / jnp.where(scalar == scalar, jnp.ones_like(scalar), scalar)
