"""The walk through a backward rule that finds where it sums over rows, in loops too.

There every row gets a weight, one: the derivative of what the rule gives by the weight of row i is
row i's part of it, if all that follows is linear in these sums.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import CALLS, bind, describe_operation, is_inexact, stops
from ghostjax.core.directed import Directed
from ghostjax.core.examples import labels_of
from ghostjax.core.inside import is_container
from ghostjax.core.meeting import Meeting
from ghostjax.core.mixing import (
    FORWARDS,
    WAY_OUT,
    gives_nothing,
    in_rule_message,
    no_position_message,
)
from ghostjax.core.place_rules import Mixed, shape_of
from ghostjax.core.promises import is_promise
from ghostjax.core.tracking import HANDLERS
from ghostjax.core.tracks import SEVERAL, Known, Track, Where, ids_of, is_single, merged
from ghostjax.core.values import Value, unsupported

_SUM = Track(Mixed("several rows are added up", is_sum=True))


def of_whole_rows(where: Where, rank: int) -> Where:
    """Of a cotangent of rows, which every position takes: it has no position, but is no sum."""
    return Where(where.rows, (Track(Known(np.full([1] * rank, SEVERAL, np.int32))),))


def _is_of_whole_rows(track: Track) -> bool:
    return isinstance(track.place, Known) and bool((track.place.ids == SEVERAL).all())


class RuleWalk(Directed):
    """Gives rows weights where a rule sums over them.

    Values are ``active`` if they depend on what gradient flows through in the function itself. So
    these are sums over rows in what they are made of, and nothing may bring them together with
    rows again.

    Args:
      paths: the parameters of the function.
      place: the function, for messages.
      every: whether rows without gradient are weighted where they are summed, too.
      names, num_rows, labels: as for ``Directed``.

    Attributes:
      weigh: ``weigh(key, meeting, operands)`` gives the first operand weighted, where the second is
        its weight; None to leave that to the taps.
      owners: by key, the parameter to which what is weighted there contributes.
    """

    takes_sums = False
    no_shard_map = (
        "rows of a function whose backward rule sums over them in a loop are not told apart. Leave "
        "the shard_map to the code around the function."
    )

    def __init__(self, names, num_rows, labels, paths, place, *, every=False):
        super().__init__(names, num_rows, {}, {}, False, None, labels)
        self.paths, self.place, self.every = paths, place, every
        self.weigh: Callable[[str, Meeting, list[Value]], Any] | None = None
        self.owners: dict[str, int] = {}

    def describe(self, eqn: Any) -> str:
        return self.place if eqn is None else describe_operation(eqn, self.around)

    def one_round(self, closed, operands):
        """Makes again in the backward pass what a round of a loop computes, as the rule does."""

        def run(operands):
            walk = copy.copy(self)
            walk.emitted, walk.specs, walk.conflicts, walk._memory = {}, {}, {}, {}
            return walk.run(closed, operands), walk.results()

        outputs, results = jax.checkpoint(run, prevent_cse=False)(operands)
        self.receive(results)
        return outputs

    def equation(self, eqn, operands):
        if gives_nothing(eqn):
            return []
        if not any(value.is_data for value in operands):
            return [Value(output) for output in bind(eqn, [value.primal for value in operands])]
        if stops(eqn):
            return list(operands)  # it keeps gradient from the loss, not from what a rule gives
        name = eqn.primitive.name
        if is_container(eqn) and not is_promise(eqn):
            handler = FORWARDS.get(name) or HANDLERS.get(name)
            if handler is not None and name != "while":
                return self._inside(handler, eqn, operands)
        sums = self._summed(eqn, operands)
        if sums is not None:
            return self._sum(eqn, operands, *sums)
        places = self.places_after(eqn, operands)
        if any(value.active and self.is_apart(value) for value in operands):
            for where, var in zip(places, eqn.outvars):
                if is_inexact(var) and not self.is_apart(where):
                    reason = _reason(where, "positions are lost").reason
                    raise self._mixed(eqn, reason)
        return self._evaluated(eqn, operands, places)

    def _inside(self, handler, eqn, operands):
        outside, self.around = self.around, (eqn, *self.around)
        is_opened = eqn.primitive.name in CALLS
        outputs = handler(self, eqn, operands if is_opened else unsupported(operands))
        self.around = outside
        return outputs if is_opened else unsupported(outputs)

    def _evaluated(self, eqn, operands, places):
        active = any(value.active for value in operands)
        outputs = bind(eqn, [value.primal for value in operands])
        return [
            self.data(output, active and is_inexact(var), where)
            for output, var, where in zip(outputs, eqn.outvars, places, strict=True)
        ]

    def is_apart(self, value: Value | Where) -> bool:
        """Whether examples are told apart."""
        where = value.where if isinstance(value, Value) else value
        return where.rows.is_apart and (self.labels is None or bool(where.positions))

    def _is_sum(self, value: Value) -> bool:
        where = value.where
        is_mixed = isinstance(where.rows.place, Mixed)
        return value.active and (is_mixed or (where.rows.is_apart and not self.is_apart(value)))

    def _summed(self, eqn, operands) -> tuple[list[int], list[Where]] | None:
        """The operands whose rows an operation adds up, and the places of its outputs; None if it
        adds up none."""
        inexact = [k for k, value in enumerate(operands) if is_inexact(eqn.invars[k])]
        apart = [k for k in inexact if self.is_apart(operands[k])]
        if not apart:
            return None
        sums = [value for value in operands if self._is_sum(value)]
        if sums:
            is_added = eqn.primitive.name in ("add", "add_any")
            if not (is_added and is_single(operands[apart[0]].where.rows)):
                reason = _reason(sums[0].where, "positions are added up").reason
                raise RowAxisError(in_rule_message(self.describe(eqn), reason))
            return apart, [Where(_SUM)]
        if not (self.every or any(operands[k].active for k in apart)):
            return None
        # Where rows go is asked as if no gradient flowed, so that they may be mixed.
        conflicts = dict(self.conflicts)
        places = self.places_after(eqn, [dataclasses.replace(v, active=False) for v in operands])
        self.conflicts = conflicts
        if all(self.is_apart(w) for w, var in zip(places, eqn.outvars) if is_inexact(var)):
            return None
        return apart, places

    def _sum(self, eqn, operands, apart: list[int], places: list[Where]):
        others = [k for k, v in enumerate(operands) if v.where.rows.is_apart and k not in apart]
        chosen = apart
        if eqn.primitive.name not in _ADDED and len(apart) + len(others) > 1:
            pair = [*apart, *others]
            chosen = [min(apart, key=lambda k: np.size(operands[k].primal))]
            self._check_aligned(eqn, operands, pair, places)
        operands = [self.weighted(v) if k in chosen else v for k, v in enumerate(operands)]
        where = [
            w
            if w.rows.is_apart
            else Where(_SUM if w.rows.place is None or w.rows.place.is_sum else w.rows)
            for w in places
        ]
        values = self._evaluated(eqn, operands, where)
        return [
            dataclasses.replace(value, active=is_inexact(var))
            for value, var in zip(values, eqn.outvars)
        ]

    def _check_aligned(self, eqn, operands, pair: list[int], places) -> None:
        """A product sums over rows which both sides have in the same order."""
        axes = _PAIRS[eqn.primitive.name](eqn, pair) if eqn.primitive.name in _PAIRS else None
        ids = [self.labels_of(operands[k], eqn) for k in pair]
        varying = [[axis for axis, size in enumerate(own.shape) if size > 1] for own in ids]
        if axes is None or not all(set(own) <= set(a) for own, a in zip(varying, axes)):
            reasons = [w.rows.place.reason for w in places if isinstance(w.rows.place, Mixed)]
            raise self._mixed(eqn, *reasons[:1] or ["it sums over them"])
        first, second = (
            own.transpose(*a, *(k for k in range(own.ndim) if k not in a)).reshape(
                [own.shape[k] for k in a]
            )
            for own, a in zip(ids, axes)
        )
        differ = merged(first, second)[1]
        if isinstance(differ, np.ndarray):
            if differ.any():
                raise self._mixed(eqn, "they are paired otherwise")
            return
        self.count_conflicts([jnp.sum(differ | (first == SEVERAL) | (second == SEVERAL))])

    def _mixed(self, eqn, reason: str) -> RowAxisError:
        return RowAxisError(
            f"{self.describe(eqn)} combines rows with other rows ({reason}), so that no row has a "
            f"gradient of its own. {WAY_OUT}"
        )

    def labels_of(self, value: Value, eqn: Any) -> Any:
        lost = no_position_message(self.describe(eqn), ", ".join(self.names[p] for p in self.paths))
        shape, (where, _) = jnp.shape(value.primal), self._positions(value)
        return labels_of(where, shape, self.num_rows, self.labels, lost)

    def _positions(self, value: Value) -> tuple[Where, list[Any]]:
        """With the positions that hold for most of a value, and the places where others differ: a
        cotangent that is scattered to a column has its position there alone."""
        where, shape = value.where, jnp.shape(value.primal)
        tracks = tuple(track for track in where.positions if not _is_of_whole_rows(track))
        if len(tracks) < 2:
            return Where(where.rows, tracks), []
        found = [(ids_of(t, shape, self.labels.positions), t) for t in tracks]
        (ids, track), *others = sorted(found, key=lambda pair: pair[0].size)
        return Where(where.rows, (track,)), [(own >= 0) & (own != ids) for own, _ in others]

    def weighted(self, value: Value) -> Value:
        """A value whose rows have weights."""
        weight = Value(jnp.ones((), value.primal.dtype), dict.fromkeys(self.paths))

        def function(primals):
            return [primals[0] * primals[1]]

        where, differ = self._positions(value)
        self.count_conflicts([jnp.sum(each, dtype=jnp.int32) for each in differ])
        return self.meet(None, function, [value, weight], [value.primal], [where])[0]

    def attach(self, meeting, function, operands):
        key = self.next_key()
        if self.weigh is not None:
            return self.weigh(key, meeting, operands)
        if key not in self.owners:
            return [operands[0].primal]
        owner = self.owners[key]
        for own in (meeting.moving, meeting.in_rows):
            for path in own.keys() - {owner}:
                del own[path]
        return self.behind(meeting, function, operands, {owner: [operands[1].primal]})[0]


def _reason(where: Where, otherwise: str) -> Mixed:
    place = where.rows.place
    return place if isinstance(place, Mixed) else Mixed(otherwise)


# What is linear in all of its operands at once, so that rows of each have parts of their own.
_ADDED = frozenset(
    """
    add add_any concatenate dynamic_update_slice pad select_n stack sub
    """.split()  # noqa: SIM905
)


def _of_product(eqn, pair: Sequence[int]) -> list[tuple[int, ...]]:
    contracted, batch = eqn.params["dimension_numbers"]
    return [(*contracted[k], *batch[k]) for k in pair]


def _of_scatter(eqn, pair: Sequence[int]) -> list[list[int]] | None:
    """Of the updates and the indices, whose last axis is that of coordinates."""
    if 0 in pair:
        return None
    window = eqn.params["dimension_numbers"].update_window_dims
    scattered = [d for d in range(len(shape_of(eqn.invars[2]))) if d not in window]
    return [scattered if k == 2 else list(range(len(scattered))) for k in pair]


# By primitive, the axes of two operands along which one is paired with the other.
_PAIRS = {
    "dot_general": _of_product,
    "scatter-add": _of_scatter,
    "scatter-sub": _of_scatter,
}
