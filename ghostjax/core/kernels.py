"""Rows through a ``pallas_call``: shown from its grid, its index maps and its kernel.

Blocks of one row each: rows are kept apart if the blocks of all operands and outputs with rows hold
the same row at every step. What the kernel computes does not matter then, but for memory that
outlives a step (scratch memory, outputs that other rows write as well): where the rows have just
changed, it must be written before it is read. Blocks of several rows: the same, and rows are
followed through the kernel itself. Everything else loses the rows.
"""

from collections.abc import Sequence
from typing import Any

from ghostjax.core.grid import (
    Grid,
    Held,
    NotShownError,
    grid_of,
    holds_rows,
    moving_axes,
    places_of,
    rows_held,
    starting_axes,
)
from ghostjax.core.kernel_rows import rows_inside
from ghostjax.core.kernel_state import Memory, reached_by_others
from ghostjax.core.place_rules import RULES, Mixed, RowInfo, Rows, lost
from ghostjax.core.promises import by_rule, opaque


def _pallas_call(eqn: Any, operands: Sequence[RowInfo], num_rows: int):
    try:
        outputs = _outputs(eqn, operands, num_rows)
    except NotShownError as error:
        outputs = [opaque(eqn, str(error))] * len(eqn.outvars)
    if any(isinstance(info, Mixed) for info in outputs):
        return by_rule(eqn, operands, outputs)
    return outputs


def _outputs(eqn, operands, num_rows) -> list[RowInfo]:
    grid = grid_of(eqn)
    held = rows_held(grid, operands, num_rows)
    candidates = [places_of(block, held, num_rows) for block in grid.outputs]
    if held.count == 1:
        given = [info for info in operands if isinstance(info, Rows)]
        outputs = [_preferred(places, given) for places in candidates]
    else:
        inside = _inside(eqn, grid, operands, held, num_rows)
        outputs = [
            _of_block(grid.outputs[k], places, info, held, num_rows)
            for k, (places, info) in enumerate(zip(candidates, inside))
        ]
    _check_aliases(grid, operands, outputs, held, num_rows)
    reached = _reached(eqn, grid, held, operands, candidates) if moving_axes(held) else {}
    references = eqn.params["jaxpr"].invars[len(operands) :]
    found = []
    for reference, places, info in zip(references, candidates, outputs):
        if not places:  # nor could a promise find them
            info = lost(eqn, "writes one of its outputs for several rows at once")
        elif info is _LOST or reference in reached:
            info = opaque(eqn, reached.get(reference, "mixes the rows of a block"))
        found.append(info)
    return found


_LOST = Mixed("")


def _preferred(places: Sequence[Rows], given: Sequence[Rows]) -> RowInfo:
    """With several rows any of them is right; with one, that of the operands is the likely one."""

    def preference(place):
        return place not in given, place.outer * place.inner > 1, place.axis

    return min(places, key=preference, default=_LOST)


def _reached(eqn, grid: Grid, held: Held, operands, candidates) -> dict[Any, str]:
    """The kernel's references to which it may bring something of other rows."""
    references = eqn.params["jaxpr"].invars
    count, outputs = len(operands), len(candidates)
    kinds = {
        var: Memory.CONSTANT
        for var, info in zip(references, operands)
        if not isinstance(info, Rows)
    }
    for var, places in zip(references[count:], candidates):
        if not places:
            kinds[var] = Memory.OUTPUT
    kinds.update(dict.fromkeys(references[count + outputs :], Memory.SCRATCH))
    starting = starting_axes(grid, held)
    programs = [
        (0 if axis in starting else None, size)
        for axis, size in enumerate(grid.sizes)
        if axis not in grid.hidden
    ]
    unclean = [references[given] for given, output in grid.aliases if not candidates[output]]
    return reached_by_others(eqn.params["jaxpr"], kinds, programs, unclean)


def _inside(eqn, grid: Grid, operands, held: Held, num_rows) -> list[RowInfo]:
    """By output, where the blocks have rows."""
    blocks = [
        block.held(info, num_rows).rows if isinstance(info, Rows) else None
        for block, info in zip(grid.operands, operands)
    ]
    jaxpr, count = eqn.params["jaxpr"], len(operands)
    memory = [*blocks, *[None] * (len(jaxpr.invars) - count)]
    after = rows_inside(jaxpr, memory, held.count, count)
    return after[count : count + len(eqn.outvars)]


def _of_block(block, places, info, held, num_rows) -> RowInfo:
    """The place in the array of rows that the blocks have at ``info``."""
    if not isinstance(info, Rows):
        return info if info is None else _LOST
    fitting = [place for place in places if block.held(place, num_rows).rows == info]
    return fitting[0] if fitting else _LOST


def _check_aliases(grid: Grid, operands, outputs, held: Held, num_rows) -> None:
    """An operand that shares memory with an output sees what is written there."""
    for given, output in grid.aliases:
        info, place, block = operands[given], outputs[output], grid.operands[given]
        if place is None or place is _LOST:
            continue
        if info is None and block is not None and holds_rows(block, place, held, num_rows):
            continue
        if info != place:
            raise NotShownError("shares memory between an output and an operand with other rows")


RULES["pallas_call"] = _pallas_call
