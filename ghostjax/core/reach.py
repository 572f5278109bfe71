"""What does not reach the loss: rows may be mixed there, as no gradient flows back from it.

Its operands are marked, so that every walk takes them as values without gradient. They are
identities all the same, through which results can be differentiated.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from ghostjax._jaxprs import CALLS, UNUSED, inner_jaxprs, is_inexact, is_var, scan_counts
from ghostjax.core.inside import is_container

_CALLS = CALLS | {"remat2"}

# Of a function with a backward rule, what the rule keeps may be no part of its outputs.
_MARKED = _CALLS | {"scan", "cond", "custom_vjp_call"}


def marked_where_unused(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> core.Jaxpr:
    """The jaxpr with what the ``wanted`` outputs do not need marked, in calls and loops too."""
    reaching, live = _reaching(jaxpr, wanted)
    live |= set(jaxpr.invars)
    marks: dict[core.Var, core.Var] = {}
    equations = []
    for eqn, flags in zip(jaxpr.eqns, reaching):
        if not any(flags):
            numbers = [var for var in dict.fromkeys(filter(is_var, eqn.invars)) if is_inexact(var)]
            own = [var for var in numbers if var in live]
            if len(numbers) < 2 and not any(map(is_inexact, eqn.outvars)) and not is_container(eqn):
                own = []  # a comparison with a constant, say
            for var in own:
                if var not in marks:
                    marks[var] = core.Var(var.aval)
                    equations.append(_mark().replace(invars=[var], outvars=[marks[var]]))
            if own:
                eqn = eqn.replace(invars=[marks[v] if v in own else v for v in eqn.invars])
        else:
            eqn = _marked_inside(eqn, flags)
        equations.append(eqn)
    same = len(equations) == len(jaxpr.eqns) and all(map(operator.is_, equations, jaxpr.eqns))
    return jaxpr if same else jaxpr.replace(eqns=equations)


def _mark() -> Any:
    (eqn,) = jax.make_jaxpr(lambda x: checkpoint_name(x, UNUSED))(jnp.float32(0)).jaxpr.eqns
    return eqn


def _marked_inside(eqn: Any, flags: list[bool]) -> Any:
    if eqn.primitive.name not in _MARKED or not is_container(eqn):
        return eqn
    if eqn.primitive.name == "scan":
        flags = _of_scan(eqn, flags)[0]

    def inside(value):
        if isinstance(value, core.ClosedJaxpr):
            found = marked_where_unused(value.jaxpr, flags)
            return value if found is value.jaxpr else value.replace(jaxpr=found)
        if isinstance(value, core.Jaxpr):
            return marked_where_unused(value, flags)
        if isinstance(value, tuple) and any(isinstance(v, core.ClosedJaxpr) for v in value):
            return tuple(map(inside, value))
        return value

    params = {key: inside(value) for key, value in eqn.params.items()}
    changed = any(_differs(params[key], value) for key, value in eqn.params.items())
    return eqn.replace(params=params) if changed else eqn


def _differs(new: Any, old: Any) -> bool:
    if isinstance(new, tuple) and isinstance(old, tuple):
        return any(a is not b for a, b in zip(new, old))
    return new is not old


def _reaching(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> tuple[list[list[bool]], set[core.Var]]:
    """By equation, which of its outputs the gradient of a wanted output flows back through; and all
    values of which that is so."""
    live = {var for var, own in zip(jaxpr.outvars, wanted, strict=True) if own and is_var(var)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        flags = [var in live and is_inexact(var) for var in eqn.outvars]
        if any(hasattr(var.aval, "inner_aval") for var in eqn.invars):
            flags = [True] * max(1, len(flags))  # what it writes is read elsewhere
        found.append(flags)
        if any(flags):
            pairs = zip(eqn.invars, _operands(eqn, flags), strict=True)
            live.update(var for var, own in pairs if own and is_var(var))
    return found[::-1], live


def inputs_of(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs the gradient of a wanted output flows back to."""
    live = _reaching(jaxpr, wanted)[1]
    return [var in live for var in jaxpr.invars]


def _operands(eqn: Any, flags: list[bool]) -> list[bool]:
    """Which operands reach the outputs that do."""
    name, every = eqn.primitive.name, [True] * len(eqn.invars)
    if name == "stop_gradient":
        return [False]
    if not is_container(eqn):
        return every
    if name == "scan":
        return _of_scan(eqn, flags)[1]
    if name == "cond":
        found = [inputs_of(jaxpr, flags) for jaxpr, _ in inner_jaxprs(eqn)]
        return [True, *map(any, zip(*found))]
    if name in _CALLS:
        ((jaxpr, _),) = inner_jaxprs(eqn)
        return inputs_of(jaxpr, flags)
    return every


def _of_scan(eqn: Any, flags: list[bool]) -> tuple[list[bool], list[bool]]:
    """Which outputs of the body, and which operands reach the outputs that do."""
    ((body, _),) = inner_jaxprs(eqn)
    consts, count = scan_counts(eqn)
    carry = flags[:count]
    while True:
        wanted = [*carry, *flags[count:]]
        used = inputs_of(body, wanted)
        joined = [a or b for a, b in zip(carry, used[consts : consts + count])]
        if joined == carry:
            return wanted, [*used[:consts], *carry, *used[consts + count :]]
        carry = joined
