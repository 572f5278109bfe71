"""Where rows and positions are in what loops carry, take slices of and stack."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ghostjax._jaxprs import is_var
from ghostjax.core.place_rules import Mixed, Rows
from ghostjax.core.places import join
from ghostjax.core.tracks import NOBODY, Known, Moved, Track, Where, ids_of, is_single


def sliced(where: Where, shape, counts, follows: bool) -> Where:
    """Of slices along the leading axis; numbers are stacked as ``lax.scan`` takes them."""
    rows, positions = counts
    return Where(
        _sliced(where.rows, shape, rows, follows),
        tuple(_sliced(track, shape, positions, follows) for track in where.positions),
    )


def _sliced(track: Track, shape, count, follows: bool) -> Track:
    place = track.place
    if not track.is_apart:
        return track
    if isinstance(place, Rows):
        if place.axis:
            return Track(place.at(place.axis - 1))
        if not follows:
            return Track(Mixed("a loop over the row axis"))
    ids = ids_of(track, shape, count)
    if isinstance(ids, np.ndarray) and ids.shape[0] == 1:
        return Track(Known(ids[0]))
    ids = jnp.broadcast_to(ids, (shape[0], *ids.shape[1:]))
    return Track(Moved(ids.shape[1:]), ids)


def stacked(where: Where, length: int) -> Where:
    """Of slices stacked along a new leading axis."""
    return Where(
        _stacked(where.rows, length), tuple(_stacked(track, length) for track in where.positions)
    )


def _stacked(track: Track, length: int) -> Track:
    place = track.place
    if isinstance(place, Rows):
        return Track(place.at(place.axis + 1))
    if isinstance(place, Known):
        return Track(Known(place.ids[None]))
    if isinstance(place, Moved):
        return Track(Moved((length, *place.shape)), track.ids)
    return track


def joined(first: Where, second: Where, shape, count, follows: bool) -> Where:
    """What holds of a value that may be either; arrays of numbers mean nothing."""
    rows = _joined(first.rows, second.rows, shape, count, follows)
    if first.rows.place is None or second.rows.place is None:
        return Where(rows, (first if second.rows.place is None else second).positions)
    places = [track.place for track in second.positions]
    return Where(rows, tuple(track for track in first.positions if track.place in places))


def _joined(first: Track, second: Track, shape, count, follows: bool) -> Track:
    if follows and first.is_apart and second.is_apart and first.place != second.place:
        shapes = [
            track.place.shape
            if isinstance(track.place, Moved)
            else ids_of(track, shape, count).shape
            for track in (first, second)
        ]
        return Track(Moved(np.broadcast_shapes(*shapes)), _MEANINGLESS)
    place = join(first.place, second.place)
    return Track(place, _MEANINGLESS if isinstance(place, Moved) else None)


_MEANINGLESS = 0


def like(where: Where, wanted: Where, shape, count: int) -> Where:
    """``where`` in the class of ``wanted``."""
    positions = []
    for track in wanted.positions:
        own = [found for found in where.positions if found.place == track.place]
        positions.append(own[0] if own else _nobody(track))
    return Where(_like(where.rows, wanted.rows, shape, count), tuple(positions))


def _like(track: Track, wanted: Track, shape, count) -> Track:
    if not isinstance(wanted.place, Moved):
        return Track(wanted.place)
    if not track.is_apart:
        return _nobody(wanted)
    return Track(
        wanted.place,
        jnp.broadcast_to(jnp.asarray(ids_of(track, shape, count), jnp.int32), wanted.place.shape),
    )


def _nobody(track: Track) -> Track:
    if not isinstance(track.place, Moved):
        return Track(track.place)
    return Track(track.place, jnp.full(track.place.shape, NOBODY, jnp.int32))


def over_positions(values: list[Any], slices: list[Any]) -> list[int]:
    """Of what a loop takes slices of, what it takes position by position."""

    def singles(value):
        return [is_single(t) and isinstance(t.place, Moved) for t in value.where.positions]

    pairs = zip(values, slices, strict=True)
    return [
        k for k, pair in enumerate(pairs) if any(singles(pair[1])) and not any(singles(pair[0]))
    ]


def at_step(sliced_values: list[Any], over: list[int]) -> Track | None:
    """The position of one round of a loop over positions."""
    for k in over:
        for track in sliced_values[k].where.positions:
            if is_single(track) and isinstance(track.place, Moved):
                return track
    return None


def placed(where: Where, step: Track, rank: int) -> Where:
    """What is carried, at the position of the round."""
    shape = (1,) * rank
    return Where(where.rows, (Track(Moved(shape), jnp.reshape(step.ids, shape)),))


def accumulators(body: core.Jaxpr, start: int, count: int) -> set[int]:
    """The carries to which every round adds, and that nothing else uses."""
    uses: dict[Any, list[Any]] = {}
    for eqn in body.eqns:
        for atom in eqn.invars:
            if is_var(atom):
                uses.setdefault(atom, []).append(eqn)
    for number, atom in enumerate(body.outvars):
        if is_var(atom):
            uses.setdefault(atom, []).append(number)
    found = set()
    for k in range(count):
        var, last = body.invars[start + k], None
        while len(uses.get(var, [])) == 1:
            (last,) = uses[var]
            if isinstance(last, int) or last.primitive.name not in _ADDITIVE:
                break
            var = last.outvars[0]
        if last == k and isinstance(last, int) and var is not body.invars[start + k]:
            found.add(k)
    return found


_ADDITIVE = frozenset(["add", "add_any", "convert_element_type", "pvary", "copy"])


def is_unowned(start: Any, value: Any) -> bool:
    """Whether a carry starts without rows, and those it gets are told by numbers."""
    kinds = (Known, Moved) if start.tangents else Moved
    return isinstance(value.rows, kinds) and not start.is_data


def as_sum(where: Where) -> Where:
    """Of a carry to which every round adds its own rows."""
    if isinstance(where.rows.place, Moved):
        return Where(Track(Mixed("several rows are added up", is_sum=True)))
    return where
