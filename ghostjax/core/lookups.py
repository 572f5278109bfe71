"""Look-ups and additions at places out of range, as gradients see them.

Where indices are promised to be in range (what ``table[ids]`` means), JAX clamps those that are not
when it reads, and drops them when it adds. A look-up's gradient is an addition and the other way
round, so that a gradient drops what forward mode would clamp. Dots are products of gradients.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.lax import GatherScatterMode

from ghostjax._jaxprs import inner_jaxprs, is_var, scan_counts

_DROP = GatherScatterMode.FILL_OR_DROP
# By primitive: the operand whose places the indices name, and what its gradient does out of range.
_PROMISING = {
    "gather": (0, {"mode": _DROP, "fill_value": 0}),
    "scatter-add": (2, {"mode": GatherScatterMode.CLIP}),
    "scatter-sub": (2, {"mode": GatherScatterMode.CLIP}),
}


def promises(eqn: Any) -> bool:
    """Whether indices are promised to be in range, here or somewhere inside."""
    return _is_promising(eqn) or any(
        promises(inner) for jaxpr, _ in inner_jaxprs(eqn) for inner in jaxpr.eqns
    )


def as_run(eqn: Any) -> Any:
    """An equation that says what it does out of range, so that its transpose does the same."""
    if not _is_promising(eqn):
        return eqn
    mode = GatherScatterMode.CLIP if eqn.primitive.name == "gather" else _DROP
    return eqn.replace(params=eqn.params | {"mode": mode})


def as_gradients_see(jaxpr: core.Jaxpr, moving: Sequence[bool]) -> core.Jaxpr:
    """A jaxpr that is linear in its ``moving`` inputs, as the transpose of what JAX transposes."""
    return _rewritten(jaxpr, moving)[0]


def _is_promising(eqn: Any) -> bool:
    promised = GatherScatterMode.PROMISE_IN_BOUNDS
    return eqn.primitive.name in _PROMISING and eqn.params["mode"] == promised


def _rewritten(jaxpr: core.Jaxpr, moving: Sequence[bool]) -> tuple[core.Jaxpr, list[bool]]:
    moved = {var for var, is_moving in zip(jaxpr.invars, moving, strict=True) if is_moving}
    equations = []
    for eqn in jaxpr.eqns:
        flags = [is_var(atom) and atom in moved for atom in eqn.invars]
        if any(flags):
            eqn, outputs = _equation(eqn, flags)
            moved.update(var for var, is_moving in zip(eqn.outvars, outputs) if is_moving)
        equations.append(eqn)
    outputs = [is_var(atom) and atom in moved for atom in jaxpr.outvars]
    return jaxpr.replace(eqns=equations), outputs


def _equation(eqn: Any, flags: list[bool]) -> tuple[Any, list[bool]]:
    every = [True] * len(eqn.outvars)
    if _is_promising(eqn):
        operand, changes = _PROMISING[eqn.primitive.name]
        return eqn.replace(params=eqn.params | changes) if flags[operand] else eqn, every
    inside = inner_jaxprs(eqn)
    if not inside or any(offset is None for _, offset in inside):
        return eqn, every
    if eqn.primitive.name == "scan":
        flags = _after_any_round(eqn, flags)
    outputs = [False] * len(eqn.outvars)

    def rewrite(item):
        nonlocal outputs
        if isinstance(item, core.ClosedJaxpr) and item.jaxpr is not item:  # one class from 0.12 on
            return core.ClosedJaxpr(rewrite(item.jaxpr), item.consts)
        if not isinstance(item, core.Jaxpr):
            return item
        jaxpr, found = _rewritten(item, flags[len(flags) - len(item.invars) :])
        outputs = [a or b for a, b in zip(outputs, found)]
        return jaxpr

    params = {
        name: type(value)(map(rewrite, value)) if type(value) in (tuple, list) else rewrite(value)
        for name, value in eqn.params.items()
    }
    return eqn.replace(params=params), outputs


def _after_any_round(eqn: Any, flags: list[bool]) -> list[bool]:
    """Which inputs of a scan's body move, when its carry has been carried."""
    ((body, _),) = inner_jaxprs(eqn)
    consts, carries = scan_counts(eqn)
    while True:
        after = _rewritten(body, flags)[1][:carries]
        carry = flags[consts : consts + carries]
        joined = [a or b for a, b in zip(carry, after)]
        if joined == carry:
            return flags
        flags = [*flags[:consts], *joined, *flags[consts + carries :]]
