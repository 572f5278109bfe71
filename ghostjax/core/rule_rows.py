"""Where rows go in a derivative rule, and where it adds them up."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import describe_operation, is_inexact, scan_counts, stops, value_in
from ghostjax.core.inside import inside, is_container
from ghostjax.core.linear import (
    Kind,
    NotLinearError,
    kind_of_literal,
    kinds_after,
)
from ghostjax.core.mixing import WAY_OUT, check_rows, in_rule_message
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, shape_of
from ghostjax.core.places import propagate
from ghostjax.core.program import Program, Step, is_literal


@dataclasses.dataclass
class Places:
    """By number of the value: where rows are, and what rows have gone into.

    Attributes:
      infos: where they are.
      moving: what depends on the rule's cotangents or tangents.
      active: what depends on operands through which gradient flows.
    """

    infos: dict[int, RowInfo]
    moving: set[int]
    active: set[int]


Followed = tuple[Step, list[RowInfo], list[bool], list[RowInfo]]


def follow(steps: Sequence[Step], places: Places, num_rows: int) -> Iterator[Followed]:
    """Fills ``places`` step by step; an error where rows that move are mixed into other rows."""
    for step in steps:
        eqn = step.eqn
        infos = [None if is_literal(atom) else places.infos.get(atom) for atom in step.inputs]
        moving, active = (
            [not is_literal(atom) and atom in which for atom in step.inputs]
            for which in (places.moving, places.active)
        )
        if any(moving):
            rows = check_rows(eqn, infos, moving, num_rows, in_rule=True)
        else:
            rows = propagate(eqn, infos, num_rows)
        if any(isinstance(info, Rows) for info in infos):
            for info, is_active in zip(infos, active):
                if is_active and isinstance(info, Mixed):
                    raise RowAxisError(in_rule_message(describe_operation(eqn), info.reason))
        places.infos.update(zip(step.outputs, rows))
        if any(moving):
            places.moving.update(step.outputs)
        if any(active) and not stops(eqn):
            places.active.update(step.outputs)
        yield step, infos, moving, rows


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """A rule in two: what it does to rows, and the linear rest that adds them up.

    Attributes:
      before: steps that keep rows in place.
      summed: values that the rest sums over their rows, with their places.
      after: steps that are linear in these.
      outputs: positions of the outputs that are not zero.
      mixes: whether the rule uses statistics of the batch, so that no row can be left out of it.
    """

    before: list[Step]
    summed: dict[int, Rows]
    after: list[Step]
    outputs: list[int]
    mixes: bool


def split_at_sums(program: Program, places: Places, num_rows: int) -> SplitRule:
    """Cuts a rule where the first sums over rows are.

    Raises:
      RowAxisError: rows are mixed before they are summed.
      NotLinearError: what follows is not linear in the sums.
    """
    before, after, summed, late, mixes = [], [], {}, set(), False
    for step, infos, moving, rows in follow(program.steps, places, num_rows):
        active = [not is_literal(atom) and atom in places.active for atom in step.inputs]
        for eqn, info, is_active in _statistics(step.eqn, infos, moving, active, num_rows):
            if is_active:
                what = "what is summed over rows"
                raise RowAxisError(in_rule_message(describe_operation(eqn), info.reason, what=what))
            mixes = True
        sums = _loses_rows(infos, moving, rows)
        if sums:
            _check_aligned(step.eqn, infos, moving, num_rows)
        if not sums and late.isdisjoint(atom for atom in step.inputs if not is_literal(atom)):
            before.append(step)
            continue
        for atom, var, info, is_moving in zip(step.inputs, step.eqn.invars, infos, moving):
            if is_moving and atom not in late:
                if not (isinstance(info, Rows) and is_inexact(var)):
                    raise NotLinearError(step.eqn)
                summed[atom] = info
        late.update(step.outputs)
        after.append(step)
    for atom in program.outputs:
        if not is_literal(atom) and atom in places.moving and atom not in late:
            if not isinstance(places.infos[atom], Rows):
                raise NotLinearError(None)  # rows were added up before a cotangent was there
            summed[atom] = places.infos[atom]
    kinds = kinds_of(program, [*before, *after], set(summed), places.moving - late)
    outputs = [k for k, atom in enumerate(program.outputs) if kinds(atom) is not Kind.ZERO]
    if any(kinds(program.outputs[position]) is Kind.FIXED for position in outputs):
        raise NotLinearError(None)
    return SplitRule(before, summed, after, outputs, mixes)


def kinds_of(
    program: Program, steps: Sequence[Step], linear: set[int], free: set[int] = frozenset()
):
    """How to read the kind of a value, with the steps that give ``free`` values left alone."""
    known = dict.fromkeys([*program.inputs, *program.consts], Kind.FIXED)
    known.update(dict.fromkeys(linear, Kind.LINEAR))

    def kind(atom):
        return kind_of_literal(atom.val) if is_literal(atom) else known[atom]

    for step in steps:
        if free.isdisjoint(step.outputs):
            if step.eqn.primitive.name == "stop_gradient":
                found = [kind(atom) for atom in step.inputs]
            else:
                found = kinds_after(step.eqn, [kind(atom) for atom in step.inputs])
        else:
            found = [Kind.LINEAR if k in linear else Kind.FIXED for k in step.outputs]
        known.update(zip(step.outputs, found))
    return kind


def _loses_rows(infos, moving, rows) -> bool:
    return any(isinstance(info, Mixed) for info in rows) and any(
        is_moving and isinstance(info, Rows) for info, is_moving in zip(infos, moving)
    )


def _statistics(eqn: Any, infos, moving, active, num_rows) -> Iterator[tuple[Any, Mixed, bool]]:
    """Values without cotangents in which rows are mixed, where something is made of them; and
    whether gradient flows through them to where they meet what has cotangents."""
    if not is_container(eqn):
        for info, is_moving, is_active in zip(infos, moving, active):
            if isinstance(info, Mixed) and not is_moving:
                yield eqn, info, is_active and any(moving)
        return
    pairs = [inside(eqn, infos, which, num_rows) for which in (moving, active)]
    for (jaxpr, own, own_moving, own_rows), (*_, own_active, _) in zip(*pairs, strict=True):
        # In a round of a loop over rows all slices are of one row; what is carried is of several.
        own = [None if is_slice else info for info, is_slice in zip(own, _row_slices(eqn, infos))]
        known = dict(zip(jaxpr.invars, zip(own, own_moving, own_active)))
        for inner in jaxpr.eqns:
            given = [value_in(known, atom, (None, False, False)) for atom in inner.invars]
            sides = [list(side) for side in zip(*given)] or [[], [], []]
            yield from _statistics(inner, *sides, own_rows)
            rows, flows = propagate(inner, sides[0], own_rows), any(sides[2]) and not stops(inner)
            known.update(
                (var, (info, any(sides[1]), flows)) for var, info in zip(inner.outvars, rows)
            )


def _row_slices(eqn: Any, infos: list[RowInfo]) -> list[bool]:
    if eqn.primitive.name != "scan":
        return [False] * len(infos)
    first = sum(scan_counts(eqn))
    return [k >= first and isinstance(i, Rows) and i.axis == 0 for k, i in enumerate(infos)]


def _check_aligned(eqn: Any, infos: list[RowInfo], moving: list[bool], num_rows: int) -> None:
    """An error where a sum over rows pairs the rows of a cotangent with other rows."""
    for jaxpr, *given, own_rows in inside(eqn, infos, moving, num_rows):
        known = dict(zip(jaxpr.invars, zip(*given)))
        for inner in jaxpr.eqns:
            pairs = [value_in(known, atom, (None, False)) for atom in inner.invars]
            inner_infos, inner_moving = [list(side) for side in zip(*pairs)] or [[], []]
            rows = propagate(inner, inner_infos, own_rows)
            if _loses_rows(inner_infos, inner_moving, rows):
                _check_aligned(inner, inner_infos, inner_moving, own_rows)
            known.update((var, (info, any(inner_moving))) for var, info in zip(inner.outvars, rows))
    if is_container(eqn):
        return
    others = [info for info, is_moving in zip(infos, moving) if not is_moving and info is not None]
    if others and not (eqn.primitive.name in _PAIRED and _PAIRED[eqn.primitive.name](eqn, infos)):
        rows = propagate(eqn, infos, num_rows)
        reasons = [info.reason for info in rows if isinstance(info, Mixed)]
        raise RowAxisError(
            f"{describe_operation(eqn)} sums over rows and pairs them with other rows "
            f"({reasons[0]}), so that no row has a gradient of its own. {WAY_OUT}"
        )


def _same_rows(first: RowInfo, second: RowInfo) -> bool:
    return (
        isinstance(first, Rows)
        and isinstance(second, Rows)
        and (first.outer, first.inner) == (second.outer, second.inner)
    )


def _dot_general(eqn, infos) -> bool:
    contracted, _ = eqn.params["dimension_numbers"]
    first, second = infos
    return _same_rows(first, second) and (first.axis, second.axis) in [*zip(*contracted)]


def _conv_general_dilated(eqn, infos) -> bool:
    dims, (first, second) = eqn.params["dimension_numbers"], infos
    groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    axes = dims.lhs_spec[1], dims.rhs_spec[1]
    return _same_rows(first, second) and groups == (1, 1) and (first.axis, second.axis) == axes


def _scatter(eqn, infos) -> bool:
    data, indices, updates = infos
    window = eqn.params["dimension_numbers"].update_window_dims
    scattered = [d for d in range(len(shape_of(eqn.invars[2]))) if d not in window]
    return (
        data is None
        and _same_rows(indices, updates)
        and indices.axis < len(scattered)
        and scattered[indices.axis] == updates.axis
    )


# What pairs one row with the same row of another operand where it sums over rows.
_PAIRED = {
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter-sub": _scatter,
}
