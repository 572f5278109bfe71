"""The grid of a ``pallas_call``: which rows the blocks of its operands hold, step by step."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ghostjax.core.known import evaluate
from ghostjax.core.place_rules import RowInfo, Rows


class NotShownError(Exception):
    """It cannot be shown that rows are kept apart; the message says why."""


@dataclasses.dataclass(frozen=True)
class Held:
    """The rows in the blocks of one operand: ``count`` of them from ``first`` on.

    ``first`` has the rank of the grid, and size 1 along the axes that it does not move with.
    ``rows`` says where in the block they are.
    """

    first: np.ndarray
    count: int
    rows: Rows

    def like(self, other: "Held") -> bool:
        return self.count == other.count and np.array_equal(
            *np.broadcast_arrays(self.first, other.first)
        )


@dataclasses.dataclass(frozen=True)
class Block:
    """How the blocks of one operand or output move over its array.

    Attributes:
      shape: of the array.
      sizes: of the block along every axis of the array; None for an axis that the block drops.
      starts: by axis, the first place at every step of the grid; None where that is not known.
      grid: its size.
    """

    shape: tuple[int, ...]
    sizes: tuple[int | None, ...]
    starts: tuple[np.ndarray | None, ...]
    grid: tuple[int, ...]

    def held(self, rows: Rows, num_rows: int) -> Held:
        """Which rows are in the block at every step."""
        axis, size = rows.axis, self.sizes[rows.axis] or 1
        start, length = self.starts[axis], self.shape[axis]
        where = sum(kept is not None for kept in self.sizes[:axis])
        if num_rows == 1:
            return Held(np.zeros([1] * len(self.grid), np.int64), 1, Rows(where, 1, size))
        if size >= length:
            if start is not None and start.any():
                raise NotShownError("reads past the row axis")
            zeros = np.zeros([1] * len(self.grid), np.int64)
            return Held(zeros, num_rows, dataclasses.replace(rows, axis=where))
        if start is None:
            raise NotShownError("has a block index along the row axis that is not known")
        if start.min() < 0 or start.max() >= length:
            raise NotShownError("reads past the row axis")
        last = np.minimum(start + size, length) - 1
        if (start // rows.inner == last // rows.inner).all():  # each block within one row
            return Held(start // rows.inner % num_rows, 1, Rows(where, 1, size))
        if rows.outer > 1 or size % rows.inner or (start % rows.inner).any():
            raise NotShownError("has blocks that cut rows")
        return Held(start // rows.inner, size // rows.inner, Rows(where, 1, rows.inner))

    def places(self, num_rows: int) -> Iterator[Rows]:
        """Every place where an array of this shape may have rows."""
        for axis, size in enumerate(self.shape):
            if size and size % num_rows == 0:
                others = size // num_rows
                for inner in range(1, others + 1):
                    if others % inner == 0:
                        yield Rows(axis, others // inner, inner)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is static about a ``pallas_call``.

    Attributes:
      sizes: of the grid.
      operands: by operand, its blocks; None for scalars that are prefetched.
      outputs: the blocks of the outputs.
      scratch: how many references the kernel has beside those.
      aliases: pairs of operand and output that share memory.
      hidden: axes of the grid that the kernel does not see: those of ``vmap``.
      parallel: axes whose steps may be taken in any order.
    """

    sizes: tuple[int, ...]
    operands: list[Block | None]
    outputs: list[Block]
    scratch: int
    aliases: list[tuple[int, int]]
    hidden: tuple[int, ...]
    parallel: tuple[int, ...]


def grid_of(eqn: Any) -> Grid:
    """Reads the parameters of a ``pallas_call``; none of their classes is public.

    Raises:
      NotShownError: something about them is not as it was known to be.
    """
    try:
        return _grid_of(eqn)
    except (AttributeError, KeyError, TypeError) as error:
        raise NotShownError(f"has parameters that are not understood: {error}") from None


def _grid_of(eqn):
    mapping = eqn.params["grid_mapping"]
    sizes = tuple(mapping.grid)
    if mapping.num_dynamic_grid_bounds or not all(isinstance(size, int) for size in sizes):
        raise NotShownError("has a grid of dynamic size")
    prefetched, blocked = mapping.num_index_operands, tuple(mapping.block_mappings)
    inputs, outputs = mapping.num_inputs, len(eqn.outvars)
    references = len(eqn.params["jaxpr"].invars)
    scratch = references - prefetched - inputs - outputs
    if eqn.params.get("mesh") is not None:
        raise NotShownError("runs on a mesh of cores")
    fits = prefetched + inputs == len(eqn.invars) and inputs + outputs == len(blocked)
    if not fits or scratch < 0 or eqn.params["jaxpr"].constvars:
        raise NotShownError("has parameters that are not understood")
    blocks = [_block(found, sizes) for found in blocked]
    semantics = getattr(eqn.params.get("compiler_params"), "dimension_semantics", None) or ()
    # Of axes that ``vmap`` has put in front nothing is said; "arbitrary" is in order.
    semantics = [None] * (len(sizes) - len(semantics)) + [*semantics]
    return Grid(
        sizes,
        [*[None] * prefetched, *blocks[:inputs]],
        blocks[inputs:],
        scratch,
        [(int(given), int(output)) for given, output in eqn.params["input_output_aliases"]],
        tuple(mapping.vmapped_dims),
        tuple(k for k, kind in enumerate(semantics) if kind is not None and _is_parallel(kind)),
    )


def _is_parallel(kind: Any) -> bool:
    return "arbitrary" not in str(getattr(kind, "value", kind)).lower()


def _block(found: Any, grid: Sequence[int]) -> Block:
    shape = tuple(found.array_aval.shape)
    steps = [
        np.arange(size, dtype=np.int64).reshape([-1 if k == axis else 1 for k in range(len(grid))])
        for axis, size in enumerate(grid)
    ]
    jaxpr = getattr(found.index_map_jaxpr, "jaxpr", found.index_map_jaxpr)
    others = len(jaxpr.invars) - len(steps)  # references of prefetched scalars
    index = evaluate(jaxpr, [*steps, *[None] * others])
    if len(index) != len(shape) or len(found.block_shape) != len(shape):
        raise NotShownError("has blocks whose index is not understood")
    sizes, starts = [], []
    for kind, place in zip(found.block_shape, index):
        name, size = type(kind).__name__, getattr(kind, "block_size", kind)
        if name == "Squeezed" or kind is None:
            sizes.append(None)
            size = 1
        elif isinstance(size, int) and name in ("Blocked", "Element", "int"):
            sizes.append(size)
        else:
            raise NotShownError(f"has blocks of a kind that is not understood: {name}")
        if name == "Element" and any(getattr(kind, "padding", (0, 0))):
            raise NotShownError("pads its blocks")
        if place is not None:
            place = place.reshape([1] * (len(grid) - place.ndim) + [*place.shape])
            place = place if name == "Element" else place * size
        starts.append(place)
    return Block(shape, tuple(sizes), tuple(starts), tuple(grid))


def rows_held(grid: Grid, operands: Sequence[RowInfo], num_rows: int) -> Held:
    """What the blocks of all operands with rows hold alike at every step."""
    held = []
    for block, info in zip(grid.operands, operands, strict=True):
        if isinstance(info, Rows):
            if block is None:
                raise NotShownError("has rows in scalars that are prefetched for all steps")
            held.append(block.held(info, num_rows))
    if not all(held[0].like(other) for other in held):
        raise NotShownError("reads different rows of its operands in one step")
    return held[0]


def places_of(block: Block, held: Held, num_rows: int) -> list[Rows]:
    """The places in an array whose blocks hold the same rows, at every step."""
    return [place for place in block.places(num_rows) if holds_rows(block, place, held, num_rows)]


def holds_rows(block: Block, place: Rows, held: Held, num_rows: int) -> bool:
    try:
        return block.held(place, num_rows).like(held)
    except NotShownError:
        return False


def moving_axes(held: Held) -> list[int]:
    """The axes of the grid along which the rows in the blocks change."""
    return [axis for axis, size in enumerate(held.first.shape) if size > 1]


def starting_axes(grid: Grid, held: Held) -> list[int]:
    """The axes of the grid that are at their first step whenever the rows have just changed.

    The last axis moves fastest, so that a step along one begins the later ones anew.
    """
    last = max(moving_axes(held))
    return [axis for axis in range(last + 1, len(grid.sizes)) if axis not in grid.parallel]
