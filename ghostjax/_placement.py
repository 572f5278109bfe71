"""Where the values of a jaxpr are split over a mesh, and what is sent for that, from shapes alone.

A few rules of what partitioners do: values are split like what they are made of; of two operands
the larger stays where it is, and the other is gathered where they disagree; a sum over an axis that
is split is a sum over devices.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Spec = tuple[tuple[str, ...], ...]  # by axis of an array, the axes of the mesh that it is split by


@dataclasses.dataclass(frozen=True)
class Placed:
    """Of one equation.

    Attributes:
      specs: of its outputs.
      sent: by kind of collective, bytes of the results on one device.
      gathered: by operand, the bytes of the copy that an all-gather makes of it.
    """

    specs: tuple[Spec, ...]
    sent: Mapping[str, int] = dataclasses.field(default_factory=dict)
    gathered: Mapping[int, int] = dataclasses.field(default_factory=dict)


def local_bytes(aval: Any, spec: Spec, sizes: Mapping[str, int]) -> int:
    """Of an array's part on one device."""
    shape = getattr(aval, "shape", ())
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    parts = (math.prod(sizes[name] for name in names) for names in spec)
    return itemsize * math.prod(math.ceil(size / part) for size, part in zip(shape, parts))


def whole(aval: Any) -> Spec:
    return ((),) * len(getattr(aval, "shape", ()))


def as_spec(spec: Any, rank: int) -> Spec:
    """Of a ``PartitionSpec``."""
    names = [*spec, *[None] * (rank - len(spec))]
    return tuple((own,) if isinstance(own, str) else tuple(own or ()) for own in names)


def placed(eqn: Any, specs: Sequence[Spec], sizes: Mapping[str, int]) -> Placed:
    """The outputs of an equation that runs no jaxpr, of operands that are split like ``specs``."""
    name = eqn.primitive.name
    if name in COLLECTIVES:
        return _collective(eqn, specs, sizes)
    if name in _SENDING:
        return _SENDING[name](eqn, specs, sizes)
    if name.startswith(("reduce_", "arg")) and "axes" in eqn.params:
        return _reduced(eqn, specs[0], sizes)
    rule = _MOVES.get(name)
    if rule is not None:
        found = rule(eqn, specs)
        return Placed((found,) * len(eqn.outvars))
    return Placed(tuple(_like_operands(eqn, var.aval, specs) for var in eqn.outvars))


def _like_operands(eqn, aval, specs) -> Spec:
    """Axis by axis like the first operand that is split there, of those that have the axis."""
    shape = getattr(aval, "shape", ())
    found: list[tuple[str, ...]] = [()] * len(shape)
    taken: set[str] = set()
    for atom, spec in zip(eqn.invars, specs):
        own = getattr(atom.aval, "shape", ())
        if len(own) != len(shape):
            continue
        for axis, names in enumerate(spec):
            free = tuple(name for name in names if name not in taken)
            if free == names and names and not found[axis] and own[axis] == shape[axis]:
                found[axis] = names
                taken.update(names)
    return tuple(found)


def _product(eqn, specs, sizes) -> Placed:
    (contracting, batch) = eqn.params["dimension_numbers"]
    avals = [atom.aval for atom in eqn.invars]
    out = eqn.outvars[0].aval
    free = [
        [axis for axis in range(len(aval.shape)) if axis not in (*contracting[k], *batch[k])]
        for k, aval in enumerate(avals)
    ]
    offsets = [len(batch[0]), len(batch[0]) + len(free[0])]
    order = sorted((0, 1), key=lambda k: -math.prod(avals[k].shape))
    found: list[tuple[str, ...]] = [()] * len(out.shape)
    taken: set[str] = set()
    lost: list[set[str]] = [set(), set()]  # by operand, axes of the mesh that it is gathered along

    def keep(k, place, names):
        if found[place] or any(name in taken for name in names):
            lost[k].update(set(names) - set(found[place]))
        elif names:
            found[place] = names
            taken.update(names)

    for k in order:
        for place, axis in enumerate(batch[k]):
            keep(k, place, specs[k][axis])
        for place, axis in enumerate(free[k], offsets[k]):
            keep(k, place, specs[k][axis])
    summed: set[str] = set()
    for k in order:
        for axis in contracting[k]:
            for name in specs[k][axis]:
                (lost[k] if name in taken else summed).add(name)
    sent: collections.Counter[str] = collections.Counter()
    gathered = {}
    for k, names in enumerate(lost):
        if names:
            kept = tuple(tuple(n for n in own if n not in names) for own in specs[k])
            gathered[k] = local_bytes(avals[k], kept, sizes)
    spec = tuple(found)
    if summed:
        sent["all-reduce"] = local_bytes(out, spec, sizes)
    return Placed((spec,), sent, gathered)


def _reduced(eqn, spec, sizes) -> Placed:
    axes = eqn.params["axes"]
    found = tuple(names for axis, names in enumerate(spec) if axis not in axes)
    sent = {}
    if any(spec[axis] for axis in axes):
        sent["all-reduce"] = sum(local_bytes(var.aval, found, sizes) for var in eqn.outvars)
    return Placed((found,) * len(eqn.outvars), sent)


def _broadcast(eqn, specs) -> Spec:
    found = list(whole(eqn.outvars[0].aval))
    shape = eqn.outvars[0].aval.shape
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[axis] == shape[place]:
            found[place] = specs[0][axis]
    return tuple(found)


def _reshape(eqn, specs) -> Spec:
    """Where axes are merged, or one is divided, the parts go with the first of them."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    found: list[tuple[str, ...]] = [()] * len(after)
    i = j = 0
    while i < len(before) and j < len(after):
        first, second, ends = before[i], after[j], [i + 1, j + 1]
        while first != second:
            if first < second and ends[0] < len(before):
                first *= before[ends[0]]
                ends[0] += 1
            elif second < first and ends[1] < len(after):
                second *= after[ends[1]]
                ends[1] += 1
            else:
                return tuple(found)
        sources = [axis for axis in range(i, ends[0]) if before[axis] > 1]
        targets = [axis for axis in range(j, ends[1]) if after[axis] > 1]
        if sources and targets:
            found[targets[0]] = specs[0][sources[0]]
        i, j = ends
    return tuple(found)


def _gather(eqn, specs, sizes) -> Placed:
    """Rows of a table: like the numbers, and like the table along what is taken of it. Where the
    table is split by its rows, every device looks up its own, and they are added up."""
    dims, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    table, found = eqn.invars[0].aval, list(whole(eqn.outvars[0].aval))
    numbers = [axis for axis in range(len(out.shape)) if axis not in dims.offset_dims]
    for place, names in zip(numbers, specs[1]):
        found[place] = names
    taken = {name for names in found for name in names}
    removed = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    kept = [axis for axis in range(len(table.shape)) if axis not in removed]
    for place, axis in zip(dims.offset_dims, kept):
        if out.shape[place] == table.shape[axis] and not taken.intersection(specs[0][axis]):
            found[place] = specs[0][axis]
    own = [specs[0][axis] for axis in (*kept, *dims.collapsed_slice_dims)]
    lost = {name for names in own for name in names if name in taken}
    summed = {name for axis in dims.collapsed_slice_dims for name in specs[0][axis]} - lost
    kept_spec = tuple(tuple(name for name in names if name not in lost) for names in specs[0])
    return Placed(
        (tuple(found),),
        {"all-reduce": local_bytes(out, tuple(found), sizes)} if summed else {},
        {0: local_bytes(table, kept_spec, sizes)} if lost else {},
    )


def _scatter(eqn, specs, sizes) -> Placed:
    """Into what is split like the operand, and like the updates along axes that both have; other
    updates are those of all devices, and are added up."""
    dims, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    found = list(specs[0])
    updates = eqn.invars[2].aval
    scattered = [axis for axis in range(len(updates.shape)) if axis not in dims.update_window_dims]
    left = {name for axis in scattered for name in specs[2][axis]}
    pairs = zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims)
    for axis, number in pairs:
        found[axis] = specs[1][number]
        left.difference_update(specs[1][number])
    removed = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    window = [axis for axis in range(len(out.shape)) if axis not in removed]
    for axis, place in zip(window, dims.update_window_dims):
        if not found[axis] and out.shape[axis] == updates.shape[place]:
            found[axis] = specs[2][place]
    size = local_bytes(out, tuple(found), sizes)
    return Placed((tuple(found),), {"all-reduce": size} if left else {})


def _collective(eqn, specs, sizes) -> Placed:
    """Inside of ``shard_map``: what it says, of what one device has."""
    outputs = tuple(_like_operands(eqn, var.aval, specs) for var in eqn.outvars)
    names = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    names = names if isinstance(names, (tuple, list)) else (names,)
    if math.prod(sizes.get(name, 1) for name in names) == 1:
        return Placed(outputs)
    size = sum(local_bytes(var.aval, spec, sizes) for var, spec in zip(eqn.outvars, outputs))
    return Placed(outputs, {COLLECTIVES[eqn.primitive.name]: size})


def _squeezed(eqn, specs) -> Spec:
    removed = {axis % len(specs[0]) for axis in eqn.params["dimensions"]}
    return tuple(names for axis, names in enumerate(specs[0]) if axis not in removed)


# Of ``shard_map``, and what compilers call them.
COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
}
# Operations that move axes, or take some of what there is.
_MOVES: dict[str, Callable[[Any, Sequence[Spec]], Spec]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeezed,
    "transpose": lambda eqn, specs: tuple(specs[0][k] for k in eqn.params["permutation"]),
}
_SENDING: dict[str, Callable[[Any, Sequence[Spec], Mapping[str, int]], Placed]] = {
    "dot_general": _product,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
}
