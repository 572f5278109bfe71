"""Rows inside ``shard_map``: every device has some of them, or all.

The row axis may be split over axes of the mesh: then a device has B / n rows, those of its place
along these axes. Over all other axes every device has the same rows, be it other features of them:
a collective over those keeps rows in place. Over the axes of the rows it moves rows to other
devices or mixes them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ghostjax._jaxprs import inner_jaxprs
from ghostjax.core.place_rules import RULES, RowInfo, Rows, agree, lost, shape_of
from ghostjax.core.places import CONTAINERS, infer
from ghostjax.core.tracks import Track


class LocalRows(int):
    """The number of rows that one device has; ``axes`` of the mesh are those rows are split over.

    A number, so that every rule for rows holds inside of ``shard_map`` as it does outside.
    """

    axes: tuple[str, ...]

    def __new__(cls, rows: int, axes: Sequence[str]) -> "LocalRows":
        found = super().__new__(cls, rows)
        found.axes = tuple(axes)
        return found


def split_axes(num_rows: int | None) -> tuple[str, ...]:
    """The axes of the mesh that rows are split over."""
    return getattr(num_rows, "axes", ())


def as_many(count: int, num_rows: int | None) -> int:
    """``count`` places of rows, which lie on the devices where the rows do, sent or not."""
    axes = split_axes(num_rows) or getattr(num_rows, "sent", ())
    return LocalRows(count, axes) if axes else count


def crosses(eqn: Any, num_rows: int | None) -> bool:
    """Whether an equation, or one inside of it, goes over the devices that rows are split over."""
    if not split_axes(num_rows):
        return False
    if eqn.primitive.name in _COLLECTIVES:
        return _crosses(eqn, num_rows)
    return any(crosses(inner, num_rows) for jaxpr, _ in inner_jaxprs(eqn) for inner in jaxpr.eqns)


def mesh_axes(eqn: Any) -> tuple[str | int, ...]:
    """The axes of the mesh that a collective goes over; those of arrays, under vmap, by number."""
    names = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def goes_over(eqn: Any, axes: Sequence[str]) -> bool:
    """Whether a collective goes over any of these axes of the mesh."""
    return any(name in axes for name in mesh_axes(eqn))


def is_one_row(num_rows: int | None) -> bool:
    """Whether there is but one row, on all devices together."""
    return num_rows == 1 and not split_axes(num_rows)


def enter(
    eqn: Any, infos: Sequence[RowInfo], num_rows: int | None
) -> tuple[list[RowInfo], int | None]:
    """Where the inputs of a ``shard_map``'s body have their rows, and how many a device has.

    All must have the same rows on the same device: those of the first operand whose rows are split,
    if there is one.
    """
    if num_rows is None:
        return [None] * len(infos), None
    entered = [
        _enter(eqn, info, spec, num_rows) if isinstance(info, Rows) else (info, ())
        for info, spec in zip(infos, eqn.params["in_specs"], strict=True)
    ]
    axes = next((axes for _, axes in entered if axes), ())
    rows = num_rows // _size(eqn, axes)
    places = [
        lost(eqn, f"splits rows of one operand over the mesh axes {found}, of another over {axes}")
        if isinstance(info, Rows) and found != axes
        else info
        for info, found in entered
    ]
    return places, LocalRows(rows, (*split_axes(num_rows), *axes))


def _enter(eqn, info: Rows, spec, num_rows: int) -> tuple[RowInfo, tuple[str, ...]]:
    names = names_along(eqn, spec, info.axis)
    if info.outer % _size(eqn, names) == 0:
        return dataclasses.replace(info, outer=info.outer // _size(eqn, names)), ()
    for cut in range(len(names)):
        before, axes = names[:cut], names[cut:]
        if _size(eqn, before) == info.outer and num_rows % _size(eqn, axes) == 0:
            return dataclasses.replace(info, outer=1), axes
    return lost(eqn, f"cuts the row axis over the mesh axes {names}, and rows apart"), ()


def enter_positions(eqn, tracks: Sequence[Track], spec, labels: Any) -> tuple[Track, ...]:
    """Those that no device has parts of."""
    found = [
        _enter(eqn, track.place, spec, labels.positions)
        for track in tracks
        if isinstance(track.place, Rows)
    ]
    return tuple(Track(info) for info, axes in found if isinstance(info, Rows) and not axes)


def leave_positions(eqn, tracks: Sequence[Track], spec) -> tuple[Track, ...]:
    return tuple(
        Track(_leave(eqn, track.place, spec, ()))
        for track in tracks
        if isinstance(track.place, Rows)
    )


def leave(
    eqn: Any, infos: Sequence[RowInfo], num_rows: int | None, local: int | None
) -> list[RowInfo]:
    """Where its outputs have their rows, from where they are on one device."""
    axes = split_axes(local)[len(split_axes(num_rows)) :]
    outputs = zip(infos, eqn.params["out_specs"], eqn.params["jaxpr"].outvars, strict=True)
    return [
        _leave(eqn, _of_one_row(eqn, info, spec, var, axes) if local == 1 else info, spec, axes)
        if isinstance(info, Rows)
        else info
        for info, spec, var in outputs
    ]


def _of_one_row(eqn, info: Rows, spec, var, axes: tuple[str, ...]) -> Rows:
    """Every axis is that of the row: the one that is put together is, outside, too."""
    for axis, size in enumerate(shape_of(var)):
        if axes and names_along(eqn, spec, axis)[-len(axes) :] == axes:
            return Rows(axis, 1, size)
    return info


def _leave(eqn, info: Rows, spec, axes: tuple[str, ...]) -> RowInfo:
    names = names_along(eqn, spec, info.axis)
    before = names[: len(names) - len(axes)]
    if (*before, *axes) != names or (axes and info.outer != 1):
        where = f"puts together over the mesh axes {names} what has rows split over {axes}"
        return lost(eqn, where)
    return dataclasses.replace(info, outer=_size(eqn, before) * info.outer)


def where_traced(eqn: Any, function: Callable[[], None]) -> None:
    """Calls ``function`` where an equation's jaxprs were traced: with the mesh's axes, if so.

    Derivative rules that are asked for there may add up over them.
    """
    if eqn.primitive.name != "shard_map":
        return function()

    def body():
        function()
        return ()

    params = eqn.params
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=(),
        out_specs=(),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    with eqn.ctx.manager:
        jax.eval_shape(mapped)


def names_along(eqn, spec, axis: int) -> tuple[str, ...]:
    """The mesh axes that an array's axis is split over; one of a single device splits nothing."""
    names = spec[axis] if axis < len(spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    return tuple(name for name in names if eqn.params["mesh"].shape[name] > 1)


def _size(eqn, names: Sequence[str]) -> int:
    return math.prod(eqn.params["mesh"].shape[name] for name in names)


def _shard_map(eqn, operands, num_rows):
    infos, local = enter(eqn, operands, num_rows)
    return leave(eqn, infer(eqn.params["jaxpr"], infos, local), num_rows, local)


def _crosses(eqn, num_rows: int) -> bool:
    """Whether a collective goes over axes that rows are split over, or over axes of arrays."""
    return any(isinstance(n, int) or n in split_axes(num_rows) for n in mesh_axes(eqn))


def _reduced(eqn, operands, num_rows):
    axes = eqn.params["axes"]
    if axes and all(isinstance(axis, int) for axis in axes):  # of arrays: under jax.vmap
        return [
            info
            if not isinstance(info, Rows)
            else lost(eqn, "over the row axis")
            if info.axis in axes
            else info.at(info.axis - sum(axis < info.axis for axis in axes))
            for info in operands
        ]
    if _crosses(eqn, num_rows):
        return lost(eqn, "combines the rows of several devices")
    return list(operands)


# Elsewhere the rows' numbers are sent with them.
_NESTED = ", inside of nested shard_maps: one over all of their axes keeps rows apart"


def _ppermute(eqn, operands, num_rows):
    if _crosses(eqn, num_rows):
        return lost(eqn, f"sends rows to other devices{_NESTED}")
    return operands[0]


def _all_gather(eqn, operands, num_rows):
    if _crosses(eqn, num_rows):
        return lost(eqn, f"gathers the rows of several devices{_NESTED}")
    rows, axis = operands[0], eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        return rows.at(rows.axis + (rows.axis >= axis))
    return _repeated(rows, axis, eqn.params["axis_size"])


def _reduce_scatter(eqn, operands, num_rows):
    if _crosses(eqn, num_rows):
        return lost(eqn, "combines the rows of several devices")
    rows, axis = operands[0], eqn.params["scatter_dimension"]
    if eqn.params["tiled"]:
        return _cut(eqn, rows, axis, eqn.params["axis_size"])
    if rows.axis == axis:
        return lost(eqn, "takes part of the row axis")
    return rows.at(rows.axis - (rows.axis > axis))


def _all_to_all(eqn, operands, num_rows):
    if _crosses(eqn, num_rows):
        return lost(eqn, f"sends rows to other devices{_NESTED}")
    rows, split, joined = (operands[0], eqn.params["split_axis"], eqn.params["concat_axis"])
    size = shape_of(eqn.invars[0])[split]
    if split != joined:
        size //= shape_of(eqn.outvars[0])[split]
        return _repeated(_cut(eqn, rows, split, size), joined, size)
    # Of what is not split elsewhere, the number of devices cannot be told by shapes.
    return lost(eqn, "exchanges parts of the row axis") if rows.axis == split else rows


def _repeated(rows: RowInfo, axis: int, times: int) -> RowInfo:
    if not isinstance(rows, Rows) or rows.axis != axis:
        return rows
    return dataclasses.replace(rows, outer=rows.outer * times)


def _cut(eqn, rows: Rows, axis: int, pieces: int) -> RowInfo:
    if rows.axis != axis:
        return rows
    if rows.outer % pieces:
        return lost(eqn, "takes part of the row axis")
    return dataclasses.replace(rows, outer=rows.outer // pieces)


def _agreeing(rule):
    def of_one(eqn, operands, num_rows):
        place = agree(eqn, operands)
        return rule(eqn, [place], num_rows) if isinstance(place, Rows) else place

    return of_one


CONTAINERS["shard_map"] = _shard_map
_COLLECTIVES = {
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin"), _reduced),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), _agreeing(_all_gather)),
    "all_to_all": _agreeing(_all_to_all),
    "ppermute": _agreeing(_ppermute),
    "reduce_scatter": _agreeing(_reduce_scatter),
}
RULES.update(_COLLECTIVES)
