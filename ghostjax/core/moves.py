"""Operations that move examples along: their numbers are moved by the same operation.

``MOVES`` has, by primitive, ``move(eqn, position, ids, operands, others)``: for the operand at
``position`` with the numbers ``ids``, those of every output, or None where its examples end up
mixed or lost. ``ids`` are an array of numpy where the numbers are known, and then the result is, if
it can be. ``others`` tells what the other operands are that become parts of the result: parameters
that are joined to examples along an axis that tells none apart belong to them; along one that does,
nothing says to whom they belong.
"""

import enum
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ghostjax._jaxprs import bind
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, shape_of
from ghostjax.core.places import propagate
from ghostjax.core.scatters import scattered
from ghostjax.core.tracks import NOBODY, repeated


class Others(enum.IntEnum):
    """What the other operands are, the most that is among them."""

    CONSTANTS = 0
    PARAMETERS = 1
    EXAMPLES = 2


Move = Callable[..., list[Any] | None]


def move(eqn: Any, position: int, ids: Any, operands: Sequence[Any], others: Others) -> list[Any]:
    """The numbers of every output by one operand's; None by output where they are lost.

    What belongs to one example as a whole does so after any operation that has no rule here.
    """
    if others is not Others.EXAMPLES and position == _PARTS.get(eqn.primitive.name):
        # Rows that stay in place have along other axes what is added to them there, too.
        found = in_place(eqn, position, ids)
        is_kept = math.prod(ids.shape) > 1 and not any(each is None for each in found)
        if is_kept or others is Others.PARAMETERS:
            return found
    if eqn.primitive.name in MOVES:
        found = MOVES[eqn.primitive.name](eqn, position, ids, operands, others)
        return [None] * len(eqn.outvars) if found is None else found
    return in_place(eqn, position, ids)


def in_place(eqn: Any, position: int, ids: Any) -> list[Any]:
    """Numbers along axes that stay in place, as rows do."""
    shape = shape_of(eqn.invars[position])
    axes = [axis for axis, size in enumerate(ids.shape) if size != 1]  # there may be no places
    stays = [Rows(axis) for axis in axes]
    outputs: list[list[RowInfo]] = [[] for _ in eqn.outvars]
    for axis in axes:
        infos: list[RowInfo] = [None] * len(eqn.invars)
        infos[position] = Rows(axis)
        for found, info in zip(outputs, propagate(eqn, infos, shape[axis])):
            found.append(info)
    return [
        ids  # itself, by which it is known again
        if places == stays and len(shape_of(var)) == ids.ndim
        else _along(ids, places, shape_of(var))
        for places, var in zip(outputs, eqn.outvars, strict=True)
    ]


def _along(ids: Any, places: list[RowInfo], shape: tuple[int, ...]) -> Any:
    """``ids`` with its axes that are longer than 1 at ``places`` of an array of that shape."""
    if any(isinstance(place, Mixed) for place in places):
        return None
    if not all(isinstance(place, Rows) for place in places):  # does not depend on the operand
        return np.full([1] * len(shape), NOBODY, np.int32)
    if not places:
        return ids.reshape([1] * len(shape))
    ids = ids.reshape([size for size in ids.shape if size != 1])
    indices = []
    for place, size in zip(places, ids.shape):
        along = np.arange(shape[place.axis]) // place.inner % size
        indices.append(along.reshape([-1 if k == place.axis else 1 for k in range(len(shape))]))
    axes = [place.axis for place in places]
    if len(set(axes)) == len(axes) and all(place.outer * place.inner == 1 for place in places):
        order = np.argsort(axes)
        return ids.transpose(order).reshape(
            [shape[k] if k in axes else 1 for k in range(len(shape))]
        )
    return ids[tuple(indices)]


def _reshape(eqn, position, ids, operands, others):
    del operands, others
    if eqn.params.get("dimensions") is None:
        old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
        if math.prod(ids.shape) == 1:
            return [ids.reshape([1] * len(new))]
        if 0 not in old:
            return [_reshaped(ids, old, new)]
    return in_place(eqn, position, ids)


def _reshaped(ids: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """By groups of axes that are merged and split together; those that tell nothing stay short."""
    i = j = 0
    full, short = [], []
    while i < len(old) or j < len(new):
        start, begin = i, j
        sizes = [math.prod(old[i : i + 1]), math.prod(new[j : j + 1])]
        i, j = i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0] *= old[i]
                i += 1
            else:
                sizes[1] *= new[j]
                j += 1
        own = range(start, min(i, len(old)))
        tells = any(ids.shape[axis] > 1 for axis in own)
        full.extend(own if tells else ())
        short.extend(size if tells else 1 for size in new[begin:j])
    return repeated(ids, old, full).reshape(short)


def _slice(eqn, position, ids, operands, others):
    del position, operands, others
    params = eqn.params
    strides = params["strides"] or [1] * ids.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides)
    index = [
        (0, 1, 1) if size == 1 else bound for size, bound in zip(ids.shape, bounds, strict=True)
    ]
    if index == [(0, size, 1) for size in ids.shape]:
        return [ids]
    return [ids[tuple(slice(*bound) for bound in index)]]


def _split(eqn, position, ids, operands, others):
    del position, operands, others
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    if ids.shape[axis] == 1:
        return [ids] * len(sizes)
    starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    index = [slice(None)] * ids.ndim
    return [
        ids[(*index[:axis], slice(a, b), *index[axis + 1 :])] for a, b in itertools.pairwise(starts)
    ]


def _rev(eqn, position, ids, operands, others):
    del position, operands, others
    axes = [axis for axis in eqn.params["dimensions"] if ids.shape[axis] > 1]
    xp = np if isinstance(ids, np.ndarray) else jnp
    return [xp.flip(ids, axes) if axes else ids]


def _concatenate(eqn, position, ids, operands, others):
    del operands
    axis = eqn.params["dimension"]
    if len(eqn.invars) == 1 or (ids.shape[axis] == 1 and others is not Others.EXAMPLES):
        return [ids]
    if others is Others.PARAMETERS:
        return None
    sizes = [shape_of(var)[axis] for var in eqn.invars]
    before, after = sum(sizes[:position]), sum(sizes[position + 1 :])
    ids = repeated(ids, shape_of(eqn.invars[position]), [axis])
    return [_padded(ids, [(before, after) if k == axis else (0, 0) for k in range(ids.ndim)])]


def _stack(eqn, position, ids, operands, others):
    del operands
    axis, count = eqn.params["axis"], len(eqn.invars)
    ids = ids.reshape(*ids.shape[:axis], 1, *ids.shape[axis:])
    if others is not Others.EXAMPLES:
        return [ids]
    widths = [(0, 0)] * ids.ndim
    widths[axis] = (position, count - position - 1)
    return [_padded(ids, widths)]


def _unstack(eqn, position, ids, operands, others):
    del position, operands, others
    axis, count = eqn.params["axis"], len(eqn.outvars)
    xp = np if isinstance(ids, np.ndarray) else jnp
    return [xp.take(ids, min(k, ids.shape[axis] - 1), axis=axis) for k in range(count)]


def _padded(ids, widths):
    xp = np if isinstance(ids, np.ndarray) else jnp
    return xp.pad(ids, widths, constant_values=NOBODY)


def _pad(eqn, position, ids, operands, others):
    del operands
    if position:
        return None
    config = eqn.params["padding_config"]
    ids = repeated(
        ids, shape_of(eqn.invars[0]), [axis for axis, widths in enumerate(config) if any(widths)]
    )
    for axis, (low, high, interior) in enumerate(config):
        if interior and ids.shape[axis] > 1:
            shape = list(ids.shape)
            shape[axis] = (shape[axis] - 1) * (interior + 1) + 1
            index = [slice(None)] * ids.ndim
            index[axis] = slice(None, None, interior + 1)
            if isinstance(ids, np.ndarray):
                wide = np.full(shape, NOBODY, np.int32)
                wide[tuple(index)] = ids
            else:
                wide = jnp.full(shape, NOBODY, jnp.int32).at[tuple(index)].set(ids)
            ids = wide
        widths = [(0, 0)] * ids.ndim
        widths[axis] = (max(low, 0), max(high, 0))
        ids = _padded(ids, widths)
        index = [slice(None)] * ids.ndim
        index[axis] = slice(max(-low, 0), ids.shape[axis] - max(-high, 0))
        ids = ids[tuple(index)]
    return [ids]


def _dynamic_slice(eqn, position, ids, operands, others):
    del others
    if position:
        return None
    starts, sizes = operands[1:], eqn.params["slice_sizes"]
    starts = [s if ids.shape[axis] > 1 else 0 for axis, s in enumerate(starts)]
    sizes = [s if ids.shape[axis] > 1 else 1 for axis, s in enumerate(sizes)]
    if isinstance(ids, np.ndarray) and all(isinstance(s, (int, np.generic)) for s in starts):
        starts = [min(max(int(s), 0), n - k) for s, n, k in zip(starts, ids.shape, sizes)]
        return [ids[tuple(slice(s, s + k) for s, k in zip(starts, sizes))]]
    return [lax.dynamic_slice(jnp.asarray(ids), _alike(starts), sizes)]


def _alike(starts):
    """Starts must have one dtype, which zeros do not know of."""
    dtype = jnp.result_type(*starts)
    return [jnp.asarray(start, dtype) for start in starts]


def _dynamic_update_slice(eqn, position, ids, operands, others):
    """What is overwritten is no part of the result, and what is not written to is the operand's."""
    if position > 1:
        return None
    if position == 0 and others is not Others.EXAMPLES:
        return [ids]
    whole, part = (shape_of(var) for var in eqn.invars[:2])
    axes = [axis for axis in range(len(whole)) if whole[axis] != part[axis]]
    starts = [s if axis in axes else 0 for axis, s in enumerate(operands[2:])]
    if position == 0:
        ids = repeated(ids, whole, axes)
        update = np.full([part[k] if k in axes else n for k, n in enumerate(ids.shape)], NOBODY)
        update = update.astype(np.int32)
    else:
        update = repeated(ids, part, axes)
        ids = np.full([whole[k] if k in axes else n for k, n in enumerate(ids.shape)], NOBODY)
        ids = ids.astype(np.int32)
    if not axes:
        return [update]
    return [lax.dynamic_update_slice(jnp.asarray(ids), jnp.asarray(update), _alike(starts))]


def _gather(eqn, position, ids, operands, others):
    del others
    if position:
        return in_place(eqn, position, ids)
    dims, indices = eqn.params["dimension_numbers"], operands[1]
    shape, sizes, mode = shape_of(eqn.invars[0]), eqn.params["slice_sizes"], eqn.params["mode"]
    # Along what is taken whole, there is one place to start at.
    indexed = [axis for axis in dims.start_index_map if sizes[axis] != shape[axis]]
    by_batch = any(ids.shape[axis] > 1 for axis in dims.operand_batching_dims)
    if all(ids.shape[axis] == 1 for axis in indexed) and (by_batch or mode in _IN_RANGE):
        found = in_place(eqn, position, ids)
        if found[0] is not None:
            return found
    ids = repeated(ids, shape, [*indexed, *dims.operand_batching_dims])
    sizes = [min(size, n) for size, n in zip(sizes, ids.shape)]
    # The gradient of a look-up out of range is dropped, but where it is to be clipped.
    if mode != lax.GatherScatterMode.CLIP:
        mode = lax.GatherScatterMode.FILL_OR_DROP
    return [lax.gather(jnp.asarray(ids), indices, dims, tuple(sizes), mode=mode, fill_value=NOBODY)]


_IN_RANGE = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _scatter(eqn, position, ids, operands, others):
    """Writing replaces; what adds up is told apart by the walk."""
    if position == 1:
        return None
    if position == 0 and others is not Others.EXAMPLES:
        return [ids]
    nobody = [np.full([1] * len(shape_of(eqn.invars[k])), NOBODY, np.int32) for k in (0, 2)]
    pair = (ids, nobody[1]) if position == 0 else (nobody[0], ids)
    if eqn.primitive.name == "scatter":
        return [scattered(eqn, *pair, operands, lax.scatter)]
    if position == 0:
        return [ids]
    return [scattered(eqn, *pair, operands, lax.scatter_max)]


def _sort(eqn, position, ids, operands, others):
    del others
    axis = eqn.params["dimension"]
    if ids.shape[axis] == 1:
        return in_place(eqn, position, ids)
    shape = shape_of(eqn.invars[0])
    places = lax.broadcasted_iota(jnp.int32, shape, axis)
    *_, order = eqn.primitive.bind(*operands, places, **eqn.params)
    found = jnp.take_along_axis(jnp.broadcast_to(ids, shape), order, axis=axis)
    outputs: list[Any] = [None] * len(eqn.outvars)
    outputs[position] = found
    # Of the others, each by its own operand: none of them says anything of this one.
    return [np.full([1] * len(shape), NOBODY, np.int32) if o is None else o for o in outputs]


def _top_k(eqn, position, ids, operands, others):
    del others
    axis = eqn.params.get("axis", len(shape_of(eqn.invars[0])) - 1)
    if ids.shape[axis] == 1:
        return in_place(eqn, position, ids)
    _, order = bind(eqn, operands)
    full = jnp.broadcast_to(ids, shape_of(eqn.invars[0]))
    return [jnp.take_along_axis(full, order, axis=axis)] * 2


def _select_n(eqn, position, ids, operands, others):
    del operands, others
    return in_place(eqn, position, ids) if position == 0 else [ids]


def _squeeze(eqn, position, ids, operands, others):
    del position, operands, others
    rank = ids.ndim
    axes = [axis % rank for axis in eqn.params["dimensions"]]
    return [ids.reshape([n for axis, n in enumerate(ids.shape) if axis not in axes])]


def _transpose(eqn, position, ids, operands, others):
    del position, operands, others
    return [ids.transpose(eqn.params["permutation"])]


def _broadcast_in_dim(eqn, position, ids, operands, others):
    del operands, others
    if position:
        return None
    shape = [1] * len(eqn.params["shape"])
    for axis, new in enumerate(eqn.params["broadcast_dimensions"]):
        shape[new] = ids.shape[axis]
    return [ids.reshape(shape)]


def _ppermute(eqn, position, ids, operands, others):
    """Numbers that are the same on all devices stay; those that get nothing get nobody."""
    if isinstance(ids, np.ndarray):
        return in_place(eqn, position, ids)
    return [lax.ppermute(ids - NOBODY, eqn.params["axis_name"], eqn.params["perm"]) + NOBODY]


_SCATTERS = ["scatter", *(f"scatter-{kind}" for kind in ("add", "sub", "mul", "min", "max"))]
# By primitive, the operand that becomes a part of the result.
_PARTS = {"pad": 0, "dynamic_update_slice": 1, **dict.fromkeys(_SCATTERS, 2)}
MOVES: dict[str, Move] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "pad": _pad,
    "ppermute": _ppermute,
    "reshape": _reshape,
    "rev": _rev,
    "select_n": _select_n,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "unstack": _unstack,
    "top_k": _top_k,
    "transpose": _transpose,
    **dict.fromkeys(_SCATTERS, _scatter),
}
