"""Functions with derivative rules of their own that move rows: the rule must move them back.

As those that sort tokens by expert: their backward rule brings cotangents home by another look-up.
"""

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any

import jax.numpy as jnp
import numpy as np

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import describe_operation, is_inexact, stops
from ghostjax.core.mixing import FOLLOWED, FORWARDS, WAY_OUT, combined_message
from ghostjax.core.place_rules import Mixed, shape_of
from ghostjax.core.places import BODIES
from ghostjax.core.program import is_literal, run
from ghostjax.core.rules import pullback, pushforward
from ghostjax.core.tracks import NO_TRACK, Track, Where, ids_of, merged
from ghostjax.core.types import zeros_of_type
from ghostjax.core.values import Value


def _forwards(walk: Any, eqn: Any, operands: Sequence[Value]) -> list[Value]:
    return walk.run(eqn.params[BODIES[eqn.primitive.name]], operands)


def _followed(walk: Any, eqn: Any, operands: Sequence[Value]) -> list[Track] | None:
    """Where rows are in the outputs; None where they are lost on the way, as in a fused loss."""
    outputs = _forwards(walk, eqn, operands)
    inexact = [is_inexact(var) for var in eqn.outvars]
    found = [value.where.rows for value in outputs]
    is_apart = [track.is_apart for track in compress(found, inexact)]
    is_checked = walk.checks_sums and not walk.shares
    if not all(is_apart) and not (is_checked and _is_sum(eqn, operands)):
        return None
    active = [value.active and is_inexact(var) for value, var in zip(operands, eqn.invars)]
    if not any(active):
        return found if all(is_apart) else None
    of_operands = [(value.where.rows, var) for value, var in zip(operands, eqn.invars)]
    of_outputs = list(zip(found, eqn.outvars))
    if eqn.primitive.name == "custom_vjp_call":
        program = pullback(eqn, active, active)
        given, wanted = compress(of_outputs, inexact), compress(of_operands, active)
    else:
        program = pushforward(eqn, active, inexact)
        given, wanted = compress(of_operands, active), compress(of_outputs, inexact)
    # Gradient flows through what the rule is given alone: the operands are factors there.
    values = [Value(value.primal, {}, value.is_data, False, value.where) for value in operands] + [
        Value(zeros_of_type(var.aval), {}, True, True, Where(track if track.is_apart else NO_TRACK))
        for track, var in given
    ]
    env = dict(zip(program.inputs, values, strict=True))
    env.update((number, Value(const)) for number, const in program.consts.items())

    def evaluate(inner, atoms):
        own = [atom if isinstance(atom, Value) else Value(atom) for atom in atoms]
        return walk.equation(inner, own)

    run(program.steps, env, evaluate)
    _check_factors(walk, eqn, program, env, active)
    for atom, (track, var) in zip(program.outputs, wanted, strict=True):
        value = None if is_literal(atom) else env[atom]
        if value is None or not value.active or not track.is_apart:
            continue  # no gradient, or none that rows have
        back, differ = value.where.rows, None
        if back.is_apart:
            pair = [ids_of(each, shape_of(var), walk.num_rows) for each in (back, track)]
            differ = merged(*pair)[1]
        is_known = isinstance(differ, np.ndarray) and all(is_apart)
        if differ is None or (is_known and differ.any()):
            reason = getattr(back.place, "reason", "it depends on no row")
            reason = reason if differ is None else "they are in another order"
            raise RowAxisError(
                f"in the derivative rule of {describe_operation(eqn, walk.around)}: rows are not "
                f"brought back to where they were ({reason}). {WAY_OUT}"
            )
        walk.count_conflicts([jnp.sum(jnp.asarray(differ), dtype=jnp.int32)])
    return found if all(is_apart) else None


def _check_factors(walk: Any, eqn: Any, program: Any, env: dict[int, Value], active: list[bool]):
    """An error where cotangents of rows meet what is mixed of rows that gradient flows through."""
    flowing = {number for number, flows in zip(program.inputs, active) if flows}
    for step in program.steps:
        numbers_of = [atom for atom in step.inputs if not is_literal(atom)]
        rows = any(env[k].active and env[k].where.rows.is_apart for k in numbers_of)
        for k in numbers_of if rows else ():
            if k in flowing and not env[k].active and isinstance(env[k].rows, Mixed):
                which = "backward" if eqn.primitive.name == "custom_vjp_call" else "derivative"
                raise RowAxisError(
                    f"in the {which} rule of {describe_operation(eqn, walk.around)}: "
                    f"{combined_message(describe_operation(step.eqn), env[k].rows)}"
                )
        if not flowing.isdisjoint(numbers_of) and not stops(step.eqn):
            pairs = zip(step.outputs, step.eqn.outvars)
            flowing.update(k for k, var in pairs if is_inexact(var))


def _is_sum(eqn: Any, operands: Sequence[Value]) -> bool:
    """Whether what a function gives may be sums over rows: it is smaller than what it is given."""
    sizes = [math.prod(shape_of(var)) for var in eqn.outvars if is_inexact(var)]
    given = [math.prod(shape_of(v)) for own, v in zip(operands, eqn.invars) if own.active]
    return eqn.primitive.name == "custom_vjp_call" and max(sizes) < max(given, default=0)


FOLLOWED.update(dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _followed))
FORWARDS.update(dict.fromkeys(FOLLOWED, _forwards))
