"""Derivative rules where examples are told apart along several axes: followed along each of them,
as if there were one row per place along it alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ghostjax._jaxprs import is_inexact
from ghostjax.core.meeting import Cells, SummedCells
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, shape_of
from ghostjax.core.places import propagate
from ghostjax.core.positions import best
from ghostjax.core.rule_rows import SplitRule
from ghostjax.core.tracks import Where, axes_apart
from ghostjax.core.values import Value


def split_along(
    eqn: Any,
    operands: Sequence[Value],
    cells: Cells,
    split: Callable[[list[RowInfo], int], SplitRule],
) -> SplitRule | None:
    """The rule in two; None if it does not sum over all axes in one place.

    Args:
      split: does the same for rows along one axis, by where operands and outputs have them.
    """
    outputs = [var for var in eqn.outvars if is_inexact(var)]
    sizes = [shape_of(outputs[0])[axis] for axis in cells.axes]
    infos = _by_axis(eqn, operands, cells)
    if infos is None:
        return None
    found = [
        split([*own, *[Rows(axis)] * len(outputs)], size)
        for own, axis, size in zip(infos, cells.axes, sizes)
    ]
    first, *others = found
    for other in others:
        same = list(map(id, first.before)) == list(map(id, other.before))
        if not same or first.summed.keys() != other.summed.keys():
            return None
    summed = {atom: [own.summed[atom] for own in found] for atom in first.summed}
    if not all(isinstance(info, Rows) for places in summed.values() for info in places):
        return None
    grids = {atom: SummedCells(tuple(places), tuple(sizes)) for atom, places in summed.items()}
    return dataclasses.replace(first, summed=grids, mixes=any(own.mixes for own in found))


def _by_axis(eqn: Any, operands: Sequence[Value], cells: Cells) -> list[list[RowInfo]] | None:
    """By axis of the outputs' cells, where the operands have it; None if they tell others apart."""
    blank = [value.rows if isinstance(value.rows, Mixed) else None for value in operands]
    infos: dict[int, list[RowInfo]] = {axis: list(blank) for axis in cells.axes}
    for k, value in enumerate(operands):
        for axis in _axes(value.where):
            alone: list[RowInfo] = [None] * len(operands)
            alone[k] = Rows(axis)
            places = propagate(eqn, alone, shape_of(eqn.invars[k])[axis])
            found = {p for p, var in zip(places, eqn.outvars) if is_inexact(var)}
            place = found.pop()
            if found or not isinstance(place, Rows) or place != Rows(place.axis):
                return None
            if place.axis not in infos or infos[place.axis][k] is not None:
                return None
            infos[place.axis][k] = Rows(axis)
    return [infos[axis] for axis in cells.axes]


def _axes(where: Where) -> list[int]:
    """Along which a value tells examples apart."""
    found = set()
    for track in (where.rows, best(where.positions)):
        if track is not None and track.is_apart:
            place = track.place
            found.update(axes_apart(place))
    return sorted(found)
