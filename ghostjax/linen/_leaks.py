"""Values made from a parameter inside its unit must leave the unit through its outputs.

Only there is a channel. A closure that is returned, an attribute that is set or a variable that is
written would carry gradient past it, so the walk follows everything a unit makes of a parameter
until it passes one of the unit's own output markers.
"""

from typing import Any

import jax.numpy as jnp

from ghostjax._jaxprs import describe_operation, inner_jaxprs, is_var, scan_counts
from ghostjax.linen._frames import Trace
from ghostjax.linen._uses import enclosing_frames, marked_frame

Taint = frozenset[tuple[str, int]]  # (parameter path, unit's frame)
_NONE: Taint = frozenset()


def find_leaks(trace: Trace, units: set[int]) -> dict[str, str]:
    """By parameter path, where something made of it is used outside its unit."""
    walk = _Walk(units)
    raw = dict(zip(trace.jaxpr.invars, trace.paths))
    for taint in walk.jaxpr(trace.jaxpr, raw, {}, ()):
        for path, _ in taint:
            walk.leaks.setdefault(
                path, "what its module makes of it reaches the loss past its outputs"
            )
    return walk.leaks


class _Walk:
    def __init__(self, units: set[int]):
        self.units = units
        self.leaks: dict[str, str] = {}

    def jaxpr(self, jaxpr, raw: dict[Any, str], tainted: dict[Any, Taint], frames) -> list[Taint]:
        """Taints of the outputs, from parameters as they are and from what came of them."""
        raw, tainted = dict(raw), dict(tainted)
        for eqn in jaxpr.eqns:
            self.equation(eqn, raw, tainted, frames)
        return [tainted.get(var, _NONE) if is_var(var) else _NONE for var in jaxpr.outvars]

    def equation(self, eqn, raw, tainted, frames):
        frames = frames + enclosing_frames(eqn)
        name = eqn.primitive.name
        operands = [var if is_var(var) else None for var in eqn.invars]
        if name == "stop_gradient":
            return
        if name in ("name", "transpose") and operands[0] in raw:
            raw[eqn.outvars[0]] = raw[operands[0]]
            return
        unit = next((frame for frame in frames if frame in self.units), None)
        incoming = frozenset().union(*(tainted.get(var, _NONE) for var in operands))
        left = marked_frame(eqn)
        for path, owner in incoming:
            if owner not in (unit, left):
                self.leaks.setdefault(
                    path,
                    "what its module makes of it is used outside the module's call, but is not one "
                    f"of its outputs ({describe_operation(eqn)})",
                )
        if unit is not None:
            incoming |= {(raw[var], unit) for var in operands if var in raw}
        outgoing = frozenset(pair for pair in incoming if pair[1] != left)
        inner = inner_jaxprs(eqn) if unit is None else []
        if inner:
            outgoing = frozenset().union(
                *(self.inside(eqn, jaxpr, offset, raw, tainted, frames) for jaxpr, offset in inner)
            )
        for var in eqn.outvars:
            if outgoing and jnp.issubdtype(var.aval.dtype, jnp.inexact):
                tainted[var] = outgoing

    def inside(self, eqn, jaxpr, offset, raw, tainted, frames) -> Taint:
        """Everything that comes out of an inner jaxpr, whose own equations may be in units."""
        if offset is None:
            return _NONE
        pairs = [(var, eqn_var) for var, eqn_var in zip(jaxpr.invars, eqn.invars[offset:])]
        inner_raw = {var: raw[outer] for var, outer in pairs if is_var(outer) and outer in raw}
        inner_tainted = {
            var: tainted[outer] for var, outer in pairs if is_var(outer) and outer in tainted
        }
        taints = self.jaxpr(jaxpr, inner_raw, inner_tainted, frames)
        if eqn.primitive.name == "scan":  # once more, with what the first round put into the carry
            consts, carry = scan_counts(eqn)
            for var, taint in zip(jaxpr.invars[consts : consts + carry], taints):
                inner_tainted[var] = inner_tainted.get(var, _NONE) | taint
            taints = self.jaxpr(jaxpr, inner_raw, inner_tainted, frames)
        return frozenset().union(*taints)
