"""Where rows go in one ordinary primitive: read from its parameters, never from equal sizes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from ghostjax._jaxprs import describe_operation


@dataclasses.dataclass(frozen=True)
class Rows:
    """Axis `axis` indexes rows, possibly merged with others.

    Its size is outer * B * inner, and row r is at (o * B + r) * inner + i.
    """

    axis: int
    outer: int = 1
    inner: int = 1

    def at(self, axis: int) -> "Rows":
        return dataclasses.replace(self, axis=int(axis))


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Depends on rows, but not with one row per place; ``is_sum``: a sum, to which rows may add."""

    reason: str
    is_sum: bool = False


RowInfo = Rows | Mixed | None
# Operands hold no Mixed and at least one Rows. One answer stands for all outputs.
Rule = Callable[..., RowInfo | list[RowInfo]]

# Ranks are equal, apart from scalars; axes of size 1 are repeated.
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite
    layout_constraint le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi name ne
    neg nextafter not one_minus_square or polygamma polynomial population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh threefry2x32 xor zeta
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# Output k is operand k.
PASSED = frozenset({"device_put", "optimization_barrier"})


def shape_of(var) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def lost(eqn, why: str) -> Mixed:
    return Mixed(f"{describe_operation(eqn)} {why}")


def agree(eqn, places: Iterable[RowInfo]) -> RowInfo:
    """The one place that every row-carrying operand maps to."""
    found = list(dict.fromkeys(p for p in places if p is not None))
    for place in found:
        if isinstance(place, Mixed):
            return place
    if len(found) > 1:
        return lost(eqn, f"meets rows at different places: {found[0]} and {found[1]}")
    return found[0] if found else None


def elementwise(eqn, operands: Sequence[RowInfo]) -> RowInfo:
    """Mixed operands do not move rows: they count only when no operand has rows."""
    shape = shape_of(eqn.outvars[0])
    rows = []
    for var, info in zip(eqn.invars, operands):
        if isinstance(info, Rows):
            own = shape_of(var)
            if len(own) != len(shape) or own[info.axis] != shape[info.axis]:
                return lost(eqn, "repeats the row axis")
            rows.append(info)
    return agree(eqn, rows or operands)


def _along(parameter: str, why: str, *, drops: bool = False) -> Rule:
    """Works along the axes in `parameter`; rows must lie along another."""

    def rule(eqn, operands, num_rows):
        rows = agree(eqn, operands)
        if not isinstance(rows, Rows):
            return rows
        axes = eqn.params[parameter]
        rank = len(shape_of(eqn.invars[0]))
        axes = [int(a) % rank for a in (axes if isinstance(axes, Sequence) else [axes])]
        if rows.axis in axes:
            return lost(eqn, why)
        return rows.at(rows.axis - sum(a < rows.axis for a in axes)) if drops else rows

    return rule


def leading(core: int) -> Rule:
    """Batched over all but the last `core` axes of the first operand."""

    def rule(eqn, operands, num_rows):
        rows = agree(eqn, operands)
        if isinstance(rows, Rows) and rows.axis >= len(shape_of(eqn.invars[0])) - core:
            return lost(eqn, "works along the row axis")
        return rows

    return rule


def _fft(eqn, operands, num_rows):
    return leading(len(eqn.params["fft_lengths"]))(eqn, operands, num_rows)


def _broadcast_in_dim(eqn, operands, num_rows):
    rows = operands[0]
    axis = eqn.params["broadcast_dimensions"][rows.axis]
    if eqn.params["shape"][axis] != shape_of(eqn.invars[0])[rows.axis]:
        return lost(eqn, "repeats the row axis")
    return rows.at(axis)


def _reshape(eqn, operands, num_rows):
    rows, old, new = operands[0], shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if (order := eqn.params.get("dimensions")) is not None:  # transposed first
        rows, old = rows.at(tuple(order).index(rows.axis)), tuple(old[d] for d in order)
    if 0 in old:
        return lost(eqn, "has no entries")
    # Row-major, entry (o, r, i) of [outer, B, inner] lies at (o * B + r) * inner + i. An axis of
    # the new shape holds all of r if what is before it divides outer and what is after it divides
    # inner; with more than one row no second axis can.
    outer = math.prod(old[: rows.axis]) * rows.outer
    inner = math.prod(old[rows.axis + 1 :]) * rows.inner
    places = []
    for axis in range(len(new)):
        before, after = math.prod(new[:axis]), math.prod(new[axis + 1 :])
        if outer % before == 0 and inner % after == 0:
            places.append(Rows(axis, outer // before, inner // after))
    if not places:
        return lost(eqn, "cuts the row axis across rows")
    # One row fits on several axes: an axis of its own first, and the old one among those.
    return min(
        places,
        key=lambda p: (p.outer * p.inner > 1, p.outer * p.inner == 1 and p.axis != rows.axis),
    )


def _tile(eqn, operands, num_rows):
    rows = operands[0]
    return dataclasses.replace(rows, outer=rows.outer * eqn.params["reps"][rows.axis])


def _transpose(eqn, operands, num_rows):
    return operands[0].at(tuple(eqn.params["permutation"]).index(operands[0].axis))


def _bitcast(eqn, operands, num_rows):
    # Between widths the last axis is added or taken away.
    rank = min(len(shape_of(eqn.invars[0])), len(shape_of(eqn.outvars[0])))
    return operands[0] if operands[0].axis < rank else lost(eqn, "merges the row axis")


def _blocks(eqn, rows: Rows, num_rows: int, start: int, size: int) -> RowInfo:
    """A part of the row axis that is made of whole runs over all rows."""
    block = num_rows * rows.inner
    if size == 0 or start % block or size % block:
        return lost(eqn, "takes part of the row axis")
    return dataclasses.replace(rows, outer=size // block)


def _slice(eqn, operands, num_rows):
    rows, strides = operands[0], eqn.params["strides"]
    if strides is not None and strides[rows.axis] != 1:
        return lost(eqn, "takes part of the row axis")
    start = eqn.params["start_indices"][rows.axis]
    return _blocks(eqn, rows, num_rows, start, eqn.params["limit_indices"][rows.axis] - start)


def _split(eqn, operands, num_rows):
    rows, sizes = operands[0], eqn.params["sizes"]
    if rows.axis != eqn.params["axis"]:
        return rows
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [_blocks(eqn, rows, num_rows, start, size) for start, size in zip(starts, sizes)]


def _concatenate(eqn, operands, num_rows):
    rows = [o for o in operands if o is not None]
    axis = eqn.params["dimension"]
    if all(o.axis != axis for o in rows) or len(operands) == 1:
        return agree(eqn, rows)
    # Runs over all rows one after the other are again such runs.
    if len(rows) == len(operands) and len({(o.axis, o.inner) for o in rows}) == 1:
        return dataclasses.replace(rows[0], outer=sum(o.outer for o in rows))
    return lost(eqn, "joins along the row axis")


def _stack(eqn, operands, num_rows):
    rows = agree(eqn, operands)
    if not isinstance(rows, Rows):
        return rows
    return rows.at(rows.axis + (rows.axis >= eqn.params["axis"]))


def _pad(eqn, operands, num_rows):
    rows = operands[0]
    if any(eqn.params["padding_config"][rows.axis]):
        return lost(eqn, "pads the row axis")
    return rows


def _dynamic_slice(eqn, operands, num_rows):
    rows = operands[0]
    # A slice as long as its axis starts at 0: starts are clamped.
    if eqn.params["slice_sizes"][rows.axis] != shape_of(eqn.invars[0])[rows.axis]:
        return lost(eqn, "takes part of the row axis")
    return rows


def _dynamic_update_slice(eqn, operands, num_rows):
    update = operands[1]
    if update is not None:
        whole, part = (shape_of(v)[update.axis] for v in eqn.invars[:2])
        if whole != part:
            return lost(eqn, "writes to part of the row axis")
    return agree(eqn, operands[:2])


def _window(eqn, operands, num_rows):
    rows = agree(eqn, operands)
    if not isinstance(rows, Rows):
        return rows
    params = eqn.params
    one = [params["window_dimensions"], params["window_strides"]]
    one += [params[key] for key in ("base_dilation", "window_dilation") if params.get(key)]
    if any(v[rows.axis] != 1 for v in one) or any(params["padding"][rows.axis]):
        return lost(eqn, "has windows along the row axis")
    return rows


def _dot_general(eqn, operands, num_rows):
    (contracted, batch) = eqn.params["dimension_numbers"]
    ranks = [len(shape_of(v)) for v in eqn.invars[:2]]
    free = [
        [d for d in range(ranks[s]) if d not in contracted[s] and d not in batch[s]] for s in (0, 1)
    ]
    places = []
    for side in (0, 1):
        rows = operands[side]
        if rows is None:
            continue
        if rows.axis in contracted[side]:
            return lost(eqn, "sums over the row axis")
        if rows.axis in batch[side]:
            places.append(rows.at(tuple(batch[side]).index(rows.axis)))
        else:
            offset = len(batch[0]) + (len(free[0]) if side else 0)
            places.append(rows.at(offset + free[side].index(rows.axis)))
    return agree(eqn, places)


def _ragged_dot_general(eqn, operands, num_rows):
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), (batch, _) = numbers.dot_dimension_numbers
    rows, bound = operands[0], (*contracted, *batch)
    if rows is None or any(operands[1:]):
        return lost(eqn, "has groups or a right side that depend on rows")
    if any(axis in bound for axis in (rows.axis, *numbers.lhs_ragged_dimensions)):
        return lost(eqn, "sums over rows")
    return rows.at(len(batch) + sum(axis not in bound for axis in range(rows.axis)))


def _conv_general_dilated(eqn, operands, num_rows):
    rows, dims = operands[0], eqn.params["dimension_numbers"]
    if operands[1] is not None:
        return lost(eqn, "has a kernel that depends on rows")
    if rows.axis != dims.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        return lost(eqn, "has rows on an axis other than the batch")
    return rows.at(dims.out_spec[0])


def _gather(eqn, operands, num_rows):
    dims, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    rank = len(shape_of(eqn.outvars[0]))
    batch = [d for d in range(rank) if d not in dims.offset_dims]
    inserted = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    window = [d for d in range(len(shape)) if d not in inserted]
    data, indices = operands
    places = []
    if data is not None:
        if data.axis in dims.operand_batching_dims:
            which = tuple(dims.operand_batching_dims).index(data.axis)
            places.append(data.at(batch[dims.start_indices_batching_dims[which]]))
        elif data.axis in window and eqn.params["slice_sizes"][data.axis] == shape[data.axis]:
            # Starts out of bounds are clamped to 0 or fill the whole slice.
            places.append(data.at(dims.offset_dims[window.index(data.axis)]))
        else:
            return lost(eqn, "looks up along the row axis (jnp.take_along_axis keeps it)")
    if indices is not None:
        if indices.axis >= len(batch):
            return lost(eqn, "has rows along its index vectors")
        places.append(indices.at(batch[indices.axis]))
    # JAX drops axes of size 1; all belongs to a single row wherever that is.
    return agree(eqn, places[:1] if num_rows == 1 else places)


def _scatter(eqn, operands, num_rows):
    dims = eqn.params["dimension_numbers"]
    data, indices, updates = operands
    shape, shape_updates = shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    inserted = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    window = [d for d in range(len(shape)) if d not in inserted]
    scattered = [d for d in range(len(shape_updates)) if d not in dims.update_window_dims]
    by_index = dict(zip(dims.scatter_indices_batching_dims, dims.operand_batching_dims))
    # What is written where no update depends on rows leaves the operand's rows in place.
    places = [data]
    if indices is not None:
        if indices.axis not in by_index and data is not None and updates is None:
            return data  # what belongs to no row makes no other rows of it, wherever it is written
        if indices.axis not in by_index:
            return lost(eqn, "writes where rows say")
        places.append(indices.at(by_index[indices.axis]))
    if updates is not None:
        if updates.axis in dims.update_window_dims:
            axis = window[tuple(dims.update_window_dims).index(updates.axis)]
            if shape[axis] != shape_updates[updates.axis]:
                return lost(eqn, "writes to part of the row axis")
        else:
            axis = by_index.get(scattered.index(updates.axis))
            if axis is None:
                return lost(eqn, "scatters the row axis")
        places.append(updates.at(axis))
    return agree(eqn, places)


def _key_batch(eqn, operands, num_rows):
    """Keys one by one; what one key gives is along new, last axes."""
    rows = agree(eqn, operands)
    shapes = {shape_of(v) for v, o in zip(eqn.invars, operands) if o is not None}
    rank = min(len(shape) for shape in (*shapes, *map(shape_of, eqn.outvars)))
    if isinstance(rows, Rows) and (len(shapes) > 1 or rows.axis >= rank):
        return lost(eqn, "works along the row axis")
    return rows


def _table(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "pad": _pad,
    "ragged_dot_general": _ragged_dot_general,
    "reduce": _along("dimensions", "over the row axis", drops=True),
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "stack": _stack,
    "unstack": _along("axis", "takes rows apart", drops=True),
    "squeeze": _along("dimensions", "drops the row axis", drops=True),
    "tile": _tile,
    "transpose": _transpose,
    "rev": _along("dimensions", "reverses the row axis"),
    "sort": _along("dimension", "along the row axis"),
    "top_k": _along("axis", "along the row axis"),
    "approx_top_k": _along("reduction_dimension", "along the row axis"),
    "lu_pivots_to_permutation": leading(1),
    **_table(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
        " argmax argmin",
        _along("axes", "over the row axis", drops=True),
    ),
    **_table(
        "cumsum cummax cummin cumprod cumlogsumexp", _along("axis", "runs along the row axis")
    ),
    **_table(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min"
        " select_and_scatter_add select_and_gather_add",
        _window,
    ),
    **_table(
        "cholesky eig eigh hessenberg householder_product lu qr schur svd tridiagonal",
        leading(2),
    ),
    **_table("scatter scatter-add scatter-mul scatter-min scatter-max scatter-sub", _scatter),
    **_table(
        "random_bits random_clone random_split random_fold_in random_wrap random_unwrap", _key_batch
    ),
}
