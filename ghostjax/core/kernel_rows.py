"""Where rows are inside a kernel whose blocks hold several of them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import CALLS, inner_jaxprs, value_in
from ghostjax.core.grid import NotShownError
from ghostjax.core.inside import is_container
from ghostjax.core.mixing import check_rows
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, shape_of
from ghostjax.core.places import join, propagate


class _Inside:
    """References hold rows where what is written to them has rows.

    Attributes:
      memory: by number of the reference, where its rows are; None while nothing with rows has been
        written.
    """

    def __init__(self, memory: list[RowInfo], num_rows: int):
        self.memory = memory
        self.num_rows = num_rows

    def run(self, jaxpr, references, infos) -> list[RowInfo]:
        known = dict(infos)
        for eqn in jaxpr.eqns:
            held = [value_in(references, atom) for atom in eqn.invars]
            operands = [value_in(known, atom) for atom in eqn.invars]
            outputs = self._equation(eqn, held, operands)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [value_in(known, atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, held, operands):
        if not any(found is not None for found in held):
            return self._value(eqn, operands)
        name = eqn.primitive.name
        if name == "get":
            return [self._read(eqn, held[0], eqn.invars[1:], operands[1:])]
        if name in ("swap", "addupdate") and not any(found is not None for found in held[1:]):
            old = self._read(eqn, held[0], eqn.invars[2:], operands[2:])
            self._write(eqn, held[0], operands[1], operands[2:])
            return [old][: len(eqn.outvars)]
        if name == "cond":
            if operands[0] is not None:
                raise NotShownError("branches as rows say")
            branches = [jaxpr for jaxpr, _ in inner_jaxprs(eqn)]
            outputs = [self._enter(b, held[1:], operands[1:]) for b in branches]
            return [functools.reduce(join, found) for found in zip(*outputs)]
        if name in CALLS:
            ((jaxpr, _),) = inner_jaxprs(eqn)
            return self._enter(jaxpr, held, operands)
        raise NotShownError(f"uses {name} on blocks of several rows")

    def _value(self, eqn, operands):
        mixed = [info for info in operands if isinstance(info, Mixed)]
        if mixed:  # no value may bring other rows back, whether gradient flows or not
            return mixed[:1] * len(eqn.outvars)
        if not is_container(eqn):
            return propagate(eqn, operands, self.num_rows)
        actives = [info is not None for info in operands]
        try:
            return check_rows(eqn, operands, actives, self.num_rows)
        except RowAxisError as error:
            raise NotShownError(f"has a kernel that mixes the rows of a block: {error}") from None

    def _enter(self, jaxpr, held, operands):
        if len(jaxpr.invars) != len(held):
            raise NotShownError("has a kernel that is not understood")
        references = {v: found for v, found in zip(jaxpr.invars, held) if found is not None}
        return self.run(jaxpr, references, dict(zip(jaxpr.invars, operands)))

    def _read(self, eqn, number, index, infos) -> RowInfo:
        rows = self.memory[number]
        if any(info is not None for info in infos):
            return Mixed("reads a block where rows say")
        if not isinstance(rows, Rows):
            return rows
        kept = _kept(eqn, index)
        is_whole = kept.get(rows.axis) == shape_of(eqn.invars[0])[rows.axis]
        return rows.at([*kept].index(rows.axis)) if is_whole else Mixed("takes rows of a block")

    def _write(self, eqn, number, info, infos) -> None:
        if any(found is not None for found in infos):
            info = Mixed("writes to a block where rows say")
        if isinstance(info, Rows):
            kept = _kept(eqn, eqn.invars[2:])
            axis = [*kept][info.axis]
            is_whole = kept[axis] == shape_of(eqn.invars[0])[axis]
            info = info.at(axis) if is_whole else Mixed("writes to rows of a block")
        self.memory[number] = join(self.memory[number], info)


def _kept(eqn, index: Sequence[Any]) -> dict[int, int]:
    """By axis of a reference that an index keeps, how many places along it."""
    shape = shape_of(eqn.invars[0])
    transforms = jax.tree.unflatten(eqn.params["tree"], list(index))
    if not transforms:
        return dict(enumerate(shape))
    indices = getattr(transforms[0], "indices", ())
    if len(transforms) > 1 or len(indices) != len(shape):
        raise NotShownError("reads or writes a block in a way that is not understood")
    kept = {}
    for axis, place in enumerate(indices):
        if hasattr(place, "size") and getattr(place, "stride", None) == 1:
            kept[axis] = place.size
        elif getattr(getattr(place, "aval", place), "shape", None) != ():
            raise NotShownError("reads or writes a block in a way that is not understood")
    return kept


def rows_inside(jaxpr: Any, memory: Sequence[RowInfo], num_rows: int, fixed: int) -> list[RowInfo]:
    """Where every reference of a kernel has rows after any number of steps.

    Args:
      memory: where they have rows before.
      num_rows: how many rows a block holds.
      fixed: how many of the references, the first ones, are operands.

    Raises:
      NotShownError: rows of a block are mixed, or what is done cannot be followed.
    """
    inside = _Inside(list(memory), num_rows)
    references = {var: number for number, var in enumerate(jaxpr.invars)}
    while True:
        before = list(inside.memory)
        inside.run(jaxpr, references, {})
        if inside.memory[:fixed] != list(memory[:fixed]):
            raise NotShownError("writes to its operands")
        if inside.memory == before:
            return before
