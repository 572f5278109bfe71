"""What the jaxprs inside an equation are given: where rows are, how many, and what is active."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from ghostjax._jaxprs import inner_jaxprs, is_inexact, is_var, scan_counts, stops
from ghostjax.core.devices import enter
from ghostjax.core.place_rules import RULES, Mixed, RowInfo, Rows
from ghostjax.core.places import propagate
from ghostjax.core.promises import is_promise

Inside = tuple[core.Jaxpr, list[RowInfo], list[bool], int]


def is_container(eqn: Any) -> bool:
    """Not what runs a jaxpr on numbers one by one, as scatters and reductions do.

    Nor what is not looked into because its caller has promised something about it.
    """
    known = eqn.primitive.name in RULES or is_promise(eqn)
    return bool(inner_jaxprs(eqn)) and not known


def inside(
    eqn: Any, infos: Sequence[RowInfo], actives: Sequence[bool], num_rows: int
) -> list[Inside]:
    """The jaxprs that an equation runs; carries are as they are after any number of rounds."""
    if not is_container(eqn):
        return []
    infos, actives = list(infos), list(actives)
    if eqn.primitive.name == "scan":
        ((body, _),) = inner_jaxprs(eqn)
        consts, carries = scan_counts(eqn)
        start, end = consts, consts + carries
        infos[start:end] = propagate(eqn, infos, num_rows)[:carries]
        infos[end:] = [slice_rows(info) for info in infos[end:]]
        actives[start:end] = _carried(body, actives, start, end)
        return [(body, infos, actives, num_rows)]
    if eqn.primitive.name == "shard_map":
        infos, num_rows = enter(eqn, infos, num_rows)
    if eqn.primitive.name == "while":
        body, tested = eqn.params["body_jaxpr"], eqn.params["cond_nconsts"]
        body, start = getattr(body, "jaxpr", body), eqn.params["body_nconsts"]
        after = propagate(eqn, infos, num_rows)
        infos, actives = [*infos[tested : tested + start], *after], actives[tested:]
        actives[start:] = _carried(body, actives, start, len(actives))
        return [(body, infos, actives, num_rows)]
    return [
        (jaxpr, infos[offset:], actives[offset:], num_rows)
        for jaxpr, offset in inner_jaxprs(eqn)
        if offset is not None
    ]


def slice_rows(info: RowInfo) -> RowInfo:
    """Rows of a slice along the leading axis."""
    if isinstance(info, Rows):
        return info.at(info.axis - 1) if info.axis else Mixed("a loop over the row axis")
    return info


def _carried(body: core.Jaxpr, actives: list[bool], start: int, end: int) -> list[bool]:
    """Which carries are active after any number of rounds."""
    carry = actives[start:end]
    while True:
        after = reached(body, [*actives[:start], *carry, *actives[end:]])
        joined = [a or b for a, b in zip(carry, after)]
        if joined == carry:
            return carry
        carry = joined


def reached(jaxpr: core.Jaxpr, actives: list[bool], *, by_gradient: bool = True) -> list[bool]:
    """Which outputs depend on active inputs: so that gradient flows, or at all."""
    found = {var for var, active in zip(jaxpr.invars, actives, strict=True) if active}
    for eqn in jaxpr.eqns:
        passes = not by_gradient or not stops(eqn)
        if passes and any(is_var(atom) and atom in found for atom in eqn.invars):
            found.update(var for var in eqn.outvars if not by_gradient or is_inexact(var))
    return [is_var(atom) and atom in found for atom in jaxpr.outvars]
