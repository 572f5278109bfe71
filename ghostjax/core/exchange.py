"""Rows that go to other devices and come back inside ``shard_map``, as tokens go to their experts.

Elsewhere every device numbers its own rows. Here numbers are those of all devices' rows from the
start, and are sent along with what they number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ghostjax._jaxprs import is_inexact, value_in
from ghostjax.core.devices import goes_over, mesh_axes, names_along, split_axes
from ghostjax.core.inside import inside
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, shape_of
from ghostjax.core.places import propagate
from ghostjax.core.tracks import NOBODY, STRANGER, Moved, Track, ids_of, merged, repeated


class SentRows(int):
    """The number of rows on all devices; ``sent`` are the axes of the mesh that they go over.

    A device has some of them, no longer one per place of its share.
    """

    sent: tuple[str, ...]

    def __new__(cls, rows: int, axes: tuple[str, ...]) -> "SentRows":
        found = super().__new__(cls, rows)
        found.sent = axes
        return found


def as_sent(count: int, num_rows: int | None) -> int:
    """``count`` positions of rows, which are sent where the rows are."""
    axes = getattr(num_rows, "sent", ())
    return SentRows(count, axes) if axes else count


def sent_over(
    jaxpr: Any, infos: Sequence[RowInfo], num_rows: int | None, every: tuple[str, ...]
) -> tuple[str, ...]:
    """The axes of the mesh that rows are sent over: those that they are split over; or ``every``,
    if rows are sent that are out of place, as from one stage of a pipeline to the next."""
    split = split_axes(num_rows)
    if _has_exchange(jaxpr, infos, num_rows, split, (Rows, Mixed)):
        return split
    return every if _has_exchange(jaxpr, infos, num_rows, every, Mixed) else ()


def _has_exchange(jaxpr, infos, num_rows, axes: tuple[str, ...], kinds: Any) -> bool:
    if not axes:
        return False
    known = dict(zip(jaxpr.invars, infos, strict=True))
    for eqn in jaxpr.eqns:
        own = [value_in(known, atom) for atom in eqn.invars]
        sent = any(isinstance(i, kinds) and is_inexact(atom) for i, atom in zip(own, eqn.invars))
        if sent and eqn.primitive.name in _SENDS and goes_over(eqn, axes):
            return True
        for inner, inner_infos, _, inner_rows in inside(eqn, own, [True] * len(own), num_rows):
            if _has_exchange(inner, inner_infos, inner_rows, axes, kinds):
                return True
        known.update(zip(eqn.outvars, propagate(eqn, own, num_rows)))
    return False


def sends(eqn: Any, num_rows: int | None) -> bool:
    """Whether it goes over the devices that rows are sent to, so that their numbers differ."""
    return eqn.primitive.name in _SENT and goes_over(eqn, getattr(num_rows, "sent", ()))


def adds_numbers_up(eqn: Any) -> bool:
    """Whether it adds up one number a device, as losses of rows: the sum has no rows."""
    return eqn.primitive.name in _SUMS and math.prod(shape_of(eqn.invars[0])) == 1


def sent(eqn: Any, ids: Any, conflicts: list[Any]) -> Any:
    """The numbers after a collective that ``sends``."""
    if eqn.primitive.name in _SUMS:
        ids = _agreed(eqn, ids, conflicts)
    return _SENT[eqn.primitive.name](eqn, ids)


def sent_out(place: Any, shape: tuple[int, ...], local: int) -> Track:
    """Where a device has its share of the rows, as numbers among those of all."""
    if not isinstance(place, Rows):
        return Track(place)
    ids = jnp.asarray(ids_of(Track(place), shape, local))
    if split_axes(local):
        ids = ids + local * lax.axis_index(split_axes(local))
    return Track(Moved(tuple(ids.shape)), ids)


def brought_back(walk: Any, eqn: Any, track: Track, spec: Any, shape, local: int) -> Any:
    """Where an output has its rows if a device has its own share again; other rows at its places
    are conflicts."""
    if not isinstance(track.place, Moved):
        return track.place
    axes = split_axes(local)
    for axis, size in enumerate(shape):
        names = names_along(eqn, spec, axis)
        is_own = names[-len(axes) :] == axes if axes else track.ids.shape[axis] > 1 and not names
        if is_own and size % local == 0:
            place = Rows(axis, 1, size // local)
            differ = merged(track.ids, sent_out(place, shape, local).ids)[1]
            walk.count_conflicts([jnp.sum(differ, dtype=jnp.int32)])
            return place
    return Mixed("rows are sent to other devices inside of shard_map and not brought back there")


def _all_to_all(eqn, ids):
    split, joined = eqn.params["split_axis"], eqn.params["concat_axis"]
    along = [split, joined] if eqn.params["tiled"] else [split]
    return lax.all_to_all(
        repeated(ids, shape_of(eqn.invars[0]), along),
        eqn.params["axis_name"],
        split,
        joined,
        axis_index_groups=eqn.params["axis_index_groups"],
        tiled=eqn.params["tiled"],
    )


def _all_gather(eqn, ids):
    axis = eqn.params["all_gather_dimension"]
    along = [axis] if eqn.params["tiled"] else []
    return lax.all_gather(
        repeated(ids, shape_of(eqn.invars[0]), along),
        eqn.params["axis_name"],
        axis_index_groups=eqn.params["axis_index_groups"],
        axis=axis,
        tiled=eqn.params["tiled"],
    )


def _agreed(eqn, ids, conflicts):
    """The numbers of what devices add up, of which but one may have somebody at a place."""
    most = _of_devices(eqn, ids, jnp.max, lax.pmax)
    owners = jnp.where(ids >= 0, ids, np.iinfo(np.int32).max)
    least = _of_devices(eqn, owners, jnp.min, lax.pmin)
    is_strange = _of_devices(eqn, ids, jnp.min, lax.pmin) == STRANGER
    conflicts.append(jnp.sum((most >= 0) & ((least != most) | is_strange), dtype=jnp.int32))
    return jnp.where(is_strange & (most < 0), STRANGER, most)


def _of_devices(eqn, ids, reduce, over_all):
    """``reduce`` over the devices that an equation goes over, all along its axes or groups."""
    names, groups = mesh_axes(eqn), eqn.params.get("axis_index_groups")
    if groups is None:
        return over_all(ids, names)
    return reduce(lax.all_gather(ids, names, axis_index_groups=groups), axis=0)


def _reduce_scatter(eqn, ids):
    axis, count = eqn.params["scatter_dimension"], eqn.params["axis_size"]
    ids = jnp.asarray(repeated(ids, shape_of(eqn.invars[0]), [axis]))
    part = ids.shape[axis] // count
    index, groups = lax.axis_index(eqn.params["axis_name"]), eqn.params["axis_index_groups"]
    if groups is not None:  # places in the groups, by device
        index = jnp.asarray(np.argsort(np.ravel(groups)) % count, np.int32)[index]
    own = lax.dynamic_slice_in_dim(ids, part * index, part, axis)
    return own if eqn.params["tiled"] else own.squeeze(axis)


def _ppermute(eqn, ids):
    """What gets nothing belongs to nobody."""
    found = lax.ppermute(ids - NOBODY, eqn.params["axis_name"], eqn.params["perm"])
    return found + NOBODY


def _psum(eqn, ids):
    del eqn
    return ids


# By primitive, the numbers after it.
_SENT: dict[str, Callable[[Any, Any], Any]] = {
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "all_to_all": _all_to_all,
    "ppermute": _ppermute,
    "psum": _psum,
    "psum_invariant": _psum,
    "reduce_scatter": _reduce_scatter,
}
_SUMS = frozenset(["psum", "psum_invariant", "reduce_scatter"])
# A sum alone brings rows to no other device.
_SENDS = _SENT.keys() - {"psum", "psum_invariant"}
