"""Where positions are after an operation: leniently, as they see each other on purpose."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ghostjax.core.follow import chosen, moved, others_of, value_operands
from ghostjax.core.place_rules import Mixed, Rows, lost, shape_of
from ghostjax.core.tracks import Known, Moved, Track, axes_apart, ids_of, is_single, track_of


def positions_after(
    eqn: Any,
    rows: Sequence[Track],
    tracks: Sequence[Sequence[Track]],
    actives: Sequence[bool],
    operands: Sequence[Any],
    supports: Sequence[Any],
    count: int,
) -> tuple[Track, ...]:
    """By output, all that tells positions apart in it.

    What has no gradient, as indices and masks, tells only along axes that nothing else does.
    """
    own = [k for k, candidates in enumerate(tracks) if candidates]
    parts = value_operands(eqn, range(len(tracks)))
    own = [k for k in own if k in parts] or own
    deciding = sorted(own, key=lambda k: not actives[k])
    flows = any(actives[k] for k in own)
    others = others_of(eqn, rows, actives, deciding)
    outputs: list[list[Track]] = [[] for _ in eqn.outvars]
    for k in deciding:
        for track in tracks[k]:
            places = _moved_leniently(eqn, k, track, operands, count, others)
            if _sums_rows(eqn, k, rows[k]) and supports[1 - k] is not None:
                places = _looked_up(eqn, k, track, supports[1 - k], count, places)
            for found, var, candidates in zip(places, eqn.outvars, outputs):
                if not found.is_apart:
                    continue
                shape = shape_of(var)
                if actives[k] or not flows or _tells_more(found, candidates, shape, count):
                    _add(candidates, found, shape, count)
    return [tuple(candidates) for candidates in outputs]


def _tells_more(track: Track, candidates: Sequence[Track], shape, count) -> bool:
    def axes(own):
        return {axis for axis, size in enumerate(ids_of(own, shape, count).shape) if size > 1}

    return bool(axes(track)) and all(axes(track).isdisjoint(axes(own)) for own in candidates)


def _moved_leniently(eqn, position, track, operands, count, others):
    shape = shape_of(eqn.invars[position])
    ids = ids_of(track, shape, count)
    name = eqn.primitive.name
    if name in _RUNNING:
        return [track]
    if name == "conv_general_dilated" and position == 0:
        return [_convolved(eqn, ids, count)]
    return moved(eqn, position, track, operands, count, others, [])


def _sums_rows(eqn, position: int, rows: Track) -> bool:
    """Whether a product sums over the rows of one side."""
    if eqn.primitive.name != "dot_general" or not rows.is_apart:
        return False
    axes = axes_apart(rows.place)
    return not set(axes).isdisjoint(eqn.params["dimension_numbers"][0][position])


def _looked_up(eqn, position, track, weights, count, places):
    """Positions that weights choose; what else is summed over positions has none."""
    if not isinstance(places[0].place, Mixed):
        return places
    ids = chosen(eqn, position, ids_of(track, shape_of(eqn.invars[position]), count), weights)
    return places if ids is None else [Track(Moved(ids[0].shape), ids[0])]


_RUNNING = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])


def _convolved(eqn, ids, count) -> Track:
    """A convolution that keeps its length keeps positions; a shorter one ends where its inputs do,
    as one over inputs padded at their beginning does."""
    dims = eqn.params["dimension_numbers"]
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    shape, index = [1] * len(after), [slice(None)] * len(before)
    strides = eqn.params["window_strides"]
    for old, new in zip(dims.lhs_spec, dims.out_spec):
        if ids.shape[old] == 1:
            continue
        if old == dims.lhs_spec[1] or after[new] > before[old]:
            return Track(lost(eqn, "mixes positions"))
        index[old] = slice(before[old] - after[new], None)
        is_window = old in dims.lhs_spec[2:]
        if is_window and after[new] > 1 and strides[dims.lhs_spec.index(old) - 2] > 1:
            return Track(lost(eqn, "skips positions"))
        shape[new] = after[new]
    order = [old for _, old in sorted(zip(dims.out_spec, dims.lhs_spec))]
    return track_of(ids[tuple(index)].transpose(order).reshape(shape), after, count)


def _add(candidates: list[Track], track: Track, shape, count) -> None:
    """Candidates along the same axes are one: of several positions the last, where they meet."""
    ids = ids_of(track, shape, count)
    for number, other in enumerate(candidates):
        if other.place == track.place and other.ids is track.ids:
            return
        theirs = ids_of(other, shape, count)
        if theirs.shape == ids.shape:
            xp = np if isinstance(ids, np.ndarray) and isinstance(theirs, np.ndarray) else jnp
            candidates[number] = track_of(xp.maximum(ids, theirs), shape, count)
            return
    candidates.append(track)


def best(candidates: Sequence[Track]) -> Track | None:
    """The candidate that is taken: one that is in place before one that has been moved, and these
    before one that is but a single position."""
    kinds = (Rows, Known, Moved)
    return min(
        candidates,
        key=lambda track: (
            is_single(track),
            [isinstance(track.place, kind) for kind in kinds].index(True),
        ),
        default=None,
    )
