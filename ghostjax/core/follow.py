"""Where rows are after an operation, by where its operands have them."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ghostjax.core.devices import crosses, mesh_axes
from ghostjax.core.exchange import adds_numbers_up, sends, sent
from ghostjax.core.moves import Others, move
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, lost, shape_of
from ghostjax.core.places import propagate
from ghostjax.core.scatters import scattered
from ghostjax.core.tracks import (
    NO_TRACK,
    NOBODY,
    SEVERAL,
    STRANGER,
    Known,
    Moved,
    Track,
    ids_of,
    is_single,
    merged,
    track_of,
)

_WRITES = frozenset(["scatter", "dynamic_update_slice"])
_ADDS = frozenset(["add", "add_any"])
_SCATTERS = frozenset(["scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"])


def moved(
    eqn: Any,
    position: int,
    track: Track,
    operands: Sequence[Any],
    count: int,
    others: Others,
    conflicts: list[Any],
) -> list[Track]:
    """By output, where one operand's examples go."""
    reasons: list[RowInfo] = [None] * len(eqn.outvars)
    is_written_over = eqn.primitive.name in _WRITES and others is Others.EXAMPLES
    if isinstance(track.place, Rows) and not is_written_over:
        infos: list[RowInfo] = [None] * len(eqn.invars)
        infos[position] = track.place
        reasons = propagate(eqn, infos, count)
        if not any(isinstance(info, Mixed) for info in reasons):
            return [Track(info) for info in reasons]
    if crosses(eqn, count):
        return [Track(lost(eqn, "goes over the devices that rows are on"))] * len(eqn.outvars)
    shape = shape_of(eqn.invars[position])
    ids = ids_of(track, shape, count)
    if sends(eqn, count):
        if adds_numbers_up(eqn):
            return [Track(Mixed("the rows of several devices are added up", is_sum=True))]
        found = [sent(eqn, ids, conflicts)]
    else:
        found = move(eqn, position, ids, operands, others)
    return [
        Track(reason if isinstance(reason, Mixed) else lost(eqn, "mixes rows"))
        if ids is None
        else NO_TRACK
        if isinstance(ids, np.ndarray) and (ids == NOBODY).all()
        else track_of(ids, shape_of(var), count)
        for ids, var, reason in zip(found, eqn.outvars, reasons, strict=True)
    ]


def rows_after(
    eqn: Any,
    tracks: Sequence[Track],
    actives: Sequence[bool],
    operands: Sequence[Any],
    supports: Sequence[Any],
    count: int,
    conflicts: list[Any],
    shares: bool = False,
) -> list[Track]:
    """Where rows are in the outputs.

    Where gradient flows through several operands, they must agree; where that shows only when the
    program runs, ``conflicts`` gets the number of places where they do not. But with ``shares``
    they need not: what has its rows in place counts, else such places are of several rows.

    Args:
      supports: by operand, an array that is zero only where the operand is, and where no gradient
        flows through it; or None.
    """
    own = [k for k, track in enumerate(tracks) if track.is_apart]
    deciding = [k for k in own if actives[k]] or own
    written = {0, 2} if eqn.primitive.name == "scatter" else {0}
    if eqn.primitive.name in _SCATTERS | {"scatter"} and not written.isdisjoint(deciding):
        deciding = [k for k in deciding if k != 1]  # where it is written is no part of it
    is_active = any(actives[k] for k in own) and not shares
    active, deciding = deciding, _with_places_of_data(eqn, tracks, own, deciding)
    if eqn.primitive.name == "select_n" and len(active) == 1 and len(deciding) > 1:
        return [_selected_beside_data(eqn, *active, deciding, tracks, operands, count, conflicts)]
    if eqn.primitive.name == "select_n" and all(k > 0 for k in deciding) and len(deciding) > 1:
        return [_selected(eqn, {k: tracks[k] for k in deciding}, operands, count)]
    others = others_of(eqn, tracks, actives, deciding)
    if _is_chosen_by_device(eqn, deciding, others, count):
        return [_selected_on_devices(eqn, *deciding, tracks, operands, count)]
    if _joins_alike(eqn, [tracks[k] for k in deciding]):
        deciding, others = deciding[:1], Others.CONSTANTS
    parts = [moved(eqn, k, tracks[k], operands, count, others, conflicts) for k in deciding]
    if eqn.primitive.name == "dot_general":
        for k, part in zip(deciding, parts):
            if isinstance(part[0].place, Mixed) and supports[1 - k] is not None:
                shape = shape_of(eqn.invars[k])
                ids = chosen(eqn, k, ids_of(tracks[k], shape, count), supports[1 - k])
                if ids is not None:
                    part[0] = _agreed(*ids, shape_of(eqn.outvars[0]), is_active, conflicts)
    if eqn.primitive.name == "dot_general" and len(deciding) == 2:
        for k in (0, 1):
            aligned = _aligned(eqn, k, tracks, count)
            if isinstance(parts[k][0].place, Mixed) and aligned is not None:
                if not shares:
                    conflicts.append(jnp.sum(aligned, dtype=jnp.int32))
                parts[k] = parts[1 - k]
    if any(isinstance(track.place, Mixed) for track in value_operands(eqn, tracks)):
        parts.append([Track(_MIXED)] * len(eqn.outvars))
    if eqn.primitive.name in _COLLECTIVES and not sends(eqn, count):
        _check_devices(eqn, [tracks[k] for k in deciding], conflicts)
    if eqn.primitive.name in _SCATTERS and 2 in deciding:
        differ = _differ_where_added(eqn, tracks[2], operands, count)
        part = parts[deciding.index(2)]
        if actives[2] and not shares:
            conflicts.append(jnp.sum(differ, dtype=jnp.int32))
        elif isinstance(part[0].place, (Known, Moved)):
            ids = ids_of(part[0], shape_of(eqn.outvars[0]), count)
            part[0] = track_of(jnp.where(differ, SEVERAL, ids), shape_of(eqn.outvars[0]), count)
    return [
        _combined(eqn, list(found), shape_of(var), count, is_active, conflicts, shares)
        for found, var in zip(zip(*parts), eqn.outvars, strict=True)
    ]


def _with_places_of_data(eqn, tracks, own: list[int], deciding: list[int]) -> list[int]:
    """Data through which no gradient flows tell whose their own places are where examples are put
    together; elsewhere, and beside rows that stay in place, they are numbers as others are."""
    name, places = eqn.primitive.name, [tracks[k].place for k in deciding]
    if name not in _PUTS_TOGETHER or len(own) == len(deciding):
        return deciding
    if name == "concatenate":
        axis = eqn.params["dimension"]
        is_along = [
            place.axis == axis if isinstance(place, Rows) else place.shape[axis] > 1
            for place in places
        ]
        return (
            own if any(is_along) or all(map(is_single, map(tracks.__getitem__, own))) else deciding
        )
    if any(isinstance(place, Rows) for place in places):
        return deciding
    return [k for k in own if k > 0] if name == "select_n" else own


_PUTS_TOGETHER = frozenset(["concatenate", "dynamic_update_slice", "scatter", "select_n", "stack"])


def _check_devices(eqn, tracks: Sequence[Track], conflicts: list[Any]) -> None:
    """What several devices put together must have the same numbers on all of them."""
    names = tuple(name for name in mesh_axes(eqn) if not isinstance(name, int))
    for track in tracks:
        if names and isinstance(track.place, Moved):
            differ = lax.pmax(track.ids, names) != lax.pmin(track.ids, names)
            conflicts.append(jnp.sum(differ, dtype=jnp.int32))


_COLLECTIVES = frozenset(
    """
    all_gather all_gather_invariant all_to_all pmax pmin psum psum_invariant reduce_scatter
    """.split()  # noqa: SIM905
)


def _combined(eqn, tracks: list[Track], shape, count, is_active, conflicts, shares: bool):
    """Where rows are in what is made of several values of one shape."""
    for track in tracks:
        if isinstance(track.place, Mixed) and track.place is not _MIXED:
            return track
    is_mixed = len(tracks) > 1 and tracks[-1].place is _MIXED
    tracks = [track for track in tracks if track.is_apart]
    if not tracks:  # an order of rows, say
        return Track(lost(eqn, "tells no rows apart"))
    result = tracks[0]
    in_place = {track.place: track for track in tracks if isinstance(track.place, Rows)}
    if shares and len(in_place) == 1:
        tracks = [*in_place.values()]
        result = tracks[0]
    for track in tracks[1:]:
        if track.place == result.place and track.ids is result.ids:
            continue
        first, second = (ids_of(each, shape, count) for each in (result, track))
        found, differ = merged(first, second)
        if isinstance(found, np.ndarray):
            if differ.any():
                return Track(_disagreement(eqn, result, track))
            result = track_of(found, shape, count)
            continue
        if is_active:
            conflicts.append(jnp.sum(differ, dtype=jnp.int32))
            if fixed := [each for each in (result, track) if _is_everywhere(each)]:
                result = fixed[0]
                continue
        else:
            found = jnp.where(differ, SEVERAL, found)
        result = track_of(found, shape, count)
    if not is_mixed or _is_everywhere(result):
        return result
    if isinstance(result.place, Known):
        return Track(_MIXED)
    return track_of(jnp.where(result.ids == NOBODY, SEVERAL, result.ids), shape, count)


def _joins_alike(eqn, tracks: list[Track]) -> bool:
    """Whether parts that belong to the same examples are joined along another axis."""
    first = tracks[0].place
    if eqn.primitive.name not in ("concatenate", "stack") or not isinstance(first, (Known, Moved)):
        return False
    if any(track.place != first or track.ids is not tracks[0].ids for track in tracks):
        return False
    axis = eqn.params.get("dimension")
    return axis is None or first.shape[axis] == 1


def others_of(eqn, tracks: Sequence[Track], actives, deciding) -> Others:
    if len(deciding) > 1 or any(isinstance(t.place, Mixed) for t in value_operands(eqn, tracks)):
        return Others.EXAMPLES
    pairs = zip(value_operands(eqn, tracks), value_operands(eqn, actives))
    if any(active and track.place is None for track, active in pairs):
        return Others.PARAMETERS
    return Others.CONSTANTS


def value_operands(eqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The operands that become parts of the result, without indices and what else decides."""
    return operands[_VALUES.get(eqn.primitive.name, slice(None))]


_VALUES = {
    "dynamic_slice": slice(1),
    "dynamic_update_slice": slice(2),
    "gather": slice(1),
    "ragged_dot_general": slice(2),
    "select_n": slice(1, None),
    **dict.fromkeys(["scatter", *_SCATTERS], slice(0, None, 2)),
}
_MIXED = Mixed("rows are joined with a value in which rows are mixed")


def _is_everywhere(track: Track) -> bool:
    """Whether every place is known to belong to somebody."""
    place = track.place
    return isinstance(place, Rows) or (isinstance(place, Known) and bool((place.ids >= 0).all()))


def _disagreement(eqn, first: Track, second: Track) -> Mixed:
    if eqn.primitive.name in _ADDS and is_single(first) and is_single(second):
        return Mixed("several rows are added up", is_sum=True)
    return lost(eqn, f"meets rows at different places: {first.place} and {second.place}")


def _selected(eqn, tracks: dict[int, Track], operands, count) -> Track:
    """The numbers of what is selected."""
    shape = shape_of(eqn.outvars[0])
    values = list(tracks.values())
    if all(track.place == values[0].place and track.ids is values[0].ids for track in values):
        return values[0]
    nobody = jnp.full(shape, NOBODY, jnp.int32)
    cases = [
        jnp.broadcast_to(ids_of(tracks[k], shape, count), shape) if k in tracks else nobody
        for k in range(1, len(operands))
    ]
    return track_of(lax.select_n(operands[0], *cases), shape, count)


def _selected_beside_data(
    eqn, active: int, deciding, tracks, operands, count, conflicts: list[Any]
) -> Track:
    """Of one value with gradient and others without: those of what a place is taken from, as short
    as theirs; ``conflicts`` gets the number of places with parts of several."""
    shape = shape_of(eqn.outvars[0])
    ids = {k: ids_of(tracks[k], shape, count) for k in deciding}
    short = np.broadcast_shapes(*(each.shape for each in ids.values()))
    if all(isinstance(each, np.ndarray) for each in ids.values()):
        wide = [np.broadcast_to(each, short) for each in ids.values()]
        if all(np.array_equal(each, wide[0]) for each in wide):
            return tracks[active]
    cases = [jnp.broadcast_to(ids.get(k, ids[active]), short) for k in range(1, len(operands))]
    which = jnp.broadcast_to(operands[0], shape).astype(jnp.int32)
    axes = [axis for axis, size in enumerate(short) if size == 1]
    most, least = (reduce(which, axis=axes, keepdims=True) for reduce in (jnp.max, jnp.min))
    all_of, differ = ids[active], False
    for k in deciding:
        all_of, unlike = merged(all_of, ids[k])
        differ = differ | unlike
    conflicts.append(jnp.sum((most != least) & differ, dtype=jnp.int32))
    found = jnp.where(most == least, lax.select_n(least, *cases), all_of)
    return track_of(found, shape, count)


def _is_chosen_by_device(eqn, deciding: list[int], others: Others, count) -> bool:
    is_one = eqn.primitive.name == "select_n" and len(deciding) == 1 and deciding[0] > 0
    return is_one and others is Others.CONSTANTS and getattr(count, "sent", ()) != ()


def _selected_on_devices(eqn, position: int, tracks, operands, count) -> Track:
    """Of one value and constants: what is taken from constants as a whole belongs to nobody."""
    shape = shape_of(eqn.outvars[0])
    ids = ids_of(tracks[position], shape, count)
    is_own = jnp.broadcast_to(operands[0], shape).astype(jnp.int32) == position - 1
    is_own = jnp.any(is_own, [k for k, size in enumerate(ids.shape) if size == 1], keepdims=True)
    return Track(Moved(is_own.shape), jnp.where(is_own, ids, NOBODY))


def chosen(eqn, position: int, ids: Any, weights: Any) -> tuple[Any, Any] | None:
    """The largest and the least number of what has a weight in the sums of a product.

    Sums over examples are look-ups where weights are zero for all but one, as those that send
    tokens to experts and back.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    own, other = position, 1 - position
    ranks = [len(shape_of(var)) for var in eqn.invars]
    free = [
        [k for k in range(ranks[side]) if k not in (*contracted[side], *batch[side])]
        for side in (0, 1)
    ]
    if any(ids.shape[axis] > 1 for axis in free[own]):
        return None
    if math.prod(shape_of(eqn.invars[other])[axis] for axis in free[other]) == 1:
        return None  # a weighted sum over examples, as of their losses, chooses none
    mask = (weights != 0).transpose(*batch[other], *contracted[other], *free[other])
    order = [*batch[own], *contracted[own]]
    ids = ids.transpose(*order, *free[own]).reshape(
        [ids.shape[axis] for axis in order] + [1] * len(free[other])
    )
    first = len(batch[own])
    axes = tuple(range(first, first + len(contracted[own])))
    most = jnp.max(jnp.where(mask, ids, NOBODY), axis=axes)
    strange = jnp.any(mask & (ids == STRANGER), axis=axes)
    most = jnp.where(strange & (most < 0), STRANGER, most)
    least = jnp.min(jnp.where(mask & (ids >= 0), ids, np.iinfo(np.int32).max), axis=axes)
    least = jnp.where(strange, STRANGER, least)
    ones = [1] * len(free[own])
    kept, last = most.shape[:first], most.shape[first:]
    shape = [*kept, *ones, *last] if own == 0 else [*kept, *last, *ones]
    return most.reshape(shape), least.reshape(shape)


def _aligned(eqn, position: int, tracks: Sequence[Track], count: int) -> Any:
    """Where an operand's numbers are not those of the other, which has its rows in place along axes
    that the product keeps; None if it has not. Then what is summed belongs to one row."""
    own, other = position, 1 - position
    if not _is_everywhere(tracks[other]):
        return None
    _, batch = eqn.params["dimension_numbers"]
    shapes = [shape_of(var) for var in eqn.invars]
    ids, theirs = (ids_of(tracks[side], shapes[side], count) for side in (own, other))
    if not {axis for axis, size in enumerate(theirs.shape) if size > 1} <= set(batch[other]):
        return None
    rest = [axis for axis in range(len(shapes[own])) if axis not in batch[own]]
    ids = ids.transpose(*batch[own], *rest)
    theirs = theirs.transpose(
        *batch[other], *(axis for axis in range(len(shapes[other])) if axis not in batch[other])
    )
    return merged(ids, theirs.reshape([*theirs.shape[: len(batch[other])], *[1] * len(rest)]))[1]


def _agreed(most, least, shape, is_active: bool, conflicts: list[Any]) -> Track:
    differ = (most >= 0) & (least != most)
    if is_active:
        conflicts.append(jnp.sum(differ, dtype=jnp.int32))
    else:
        most = jnp.where(differ, SEVERAL, most)
    return Track(Moved(most.shape), most)


def _differ_where_added(eqn, track: Track, operands, count) -> Any:
    """Where what is added up at one place belongs to several examples."""
    ids = ids_of(track, shape_of(eqn.invars[2]), count)
    largest = np.iinfo(np.int32).max
    whole = [1] * len(shape_of(eqn.invars[0]))
    least = scattered(
        eqn,
        np.full(whole, largest, np.int32),
        jnp.where(ids >= 0, ids, largest),
        operands,
        lax.scatter_min,
    )
    most = scattered(eqn, np.full(whole, NOBODY, np.int32), ids, operands, lax.scatter_max)
    return (most >= 0) & (least != most)
