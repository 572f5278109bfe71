"""What a walk knows of rows and positions: where they are after every operation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import CALLS, describe_operation
from ghostjax.core.devices import as_many
from ghostjax.core.examples import Labels
from ghostjax.core.exchange import as_sent
from ghostjax.core.follow import rows_after
from ghostjax.core.inside import is_container
from ghostjax.core.mixing import (
    CHECKS,
    FOLLOWED,
    FORWARDS,
    check_rows,
    combined_message,
    several_message,
)
from ghostjax.core.place_rules import shape_of
from ghostjax.core.places import Mixed, RowInfo, Rows, propagate
from ghostjax.core.positions import positions_after
from ghostjax.core.support import LAYOUTS, support_of
from ghostjax.core.tracks import Known, Moved, Track, Where, ids_of, is_single, settled
from ghostjax.core.values import Value, unsupported

# By primitive, ``handle(walk, eqn, operands)``: what walks inside.
HANDLERS: dict[str, Callable[..., list[Value]]] = {}


class Tracking:
    """Follows rows, and positions where there are labels for them.

    Attributes:
      num_rows: B; None where the jaxpr is that of a single row.
      checks_rows: whether rows that are mixed are an error; another walk may have looked.
      follows: whether rows that do not stay in place are followed by their numbers.
      shares: whether rows may be mixed while gradient flows, as their shares are asked for.
      checks_sums: whether a rule that sums over rows is to be checked here; that of a meeting is
        where it is made.
      labels: of positions, where examples are not rows.
      around: the calls that are being walked, the innermost first, for messages.
      conflicts: how often gradient flows through places of several examples at once; from loops
        stacked, like what is emitted.
    """

    num_rows: int | None
    checks_rows = True
    follows = False
    shares = False
    checks_sums = True
    labels: Labels | None = None
    around: tuple[Any, ...] = ()
    conflicts: dict[str, Any]
    named_meetings: dict[str, Any]
    _prefix: str
    _memory: dict[tuple[Any, int], tuple[Any, Any]]

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """How many rows, and how many positions there are."""
        return self.num_rows, self.labels and self.labels.positions

    def places_after(self, eqn, operands) -> list[Where]:
        if self.num_rows is None:
            return [Where()] * len(eqn.outvars)
        actives = [value.active or bool(value.tangents) for value in operands]
        rows = self._rows_after(eqn, operands, actives)
        if self.labels is None:
            return [Where(track) for track in rows]
        if is_container(eqn) and any(value.where.positions for value in operands):
            if eqn.primitive.name in FORWARDS:
                values = self._apart(eqn, operands, FORWARDS[eqn.primitive.name])
                inside = [value.where for value in values]
            else:
                inside = self._followed_inside(eqn, operands)
            if inside is not None:
                return [Where(track, where.positions) for track, where in zip(rows, inside)]
        positions = positions_after(
            eqn,
            [value.where.rows for value in operands],
            [value.where.positions for value in operands],
            actives,
            [value.primal for value in operands],
            [support_of(value) for value in operands],
            as_sent(self.labels.positions, self.num_rows),
        )
        return [Where(*pair) for pair in zip(rows, positions, strict=True)]

    def _rows_after(self, eqn, operands, actives) -> list[Track]:
        infos = [value.rows for value in operands]
        found, error = None, None
        if not any(isinstance(info, (Known, Moved)) for info in infos):
            try:
                if (self.checks_rows or self.follows) and not self._shares(eqn, operands):
                    found = check_rows(eqn, infos, actives, self.num_rows, self.around)
                else:
                    found = propagate(eqn, infos, self.num_rows)
            except RowAxisError as mixed:
                if not self.follows:
                    raise
                if eqn.primitive.name in CHECKS:
                    return self._followed_rule(eqn, operands, mixed)
                error = mixed
            is_kept = found and not any(isinstance(info, Mixed) for info in found)
            if is_kept or not self.follows or not any(isinstance(info, Rows) for info in infos):
                return [Track(info) for info in found]
        followed = self._followed(eqn, operands, actives)
        if error is not None and any(isinstance(track.place, Mixed) for track in followed):
            raise error
        if found is None:
            return followed
        return [
            track if isinstance(info, Mixed) and track.is_apart else Track(info)
            for info, track in zip(found, followed, strict=True)
        ]

    def _followed(self, eqn, operands, actives) -> list[Track]:
        """Rows that do not stay in place, by what the operation does to them."""
        tracks = [value.where.rows for value in operands]
        is_sum = eqn.primitive.name in ("add", "add_any")
        for track, active in zip(tracks, actives):
            if not (active and isinstance(track.place, Mixed)):
                continue
            if not any(other.is_apart for other in tracks):
                continue
            if is_sum and track.place.is_sum and any(is_single(other) for other in tracks):
                return [track]
            if self.shares:
                continue
            raise RowAxisError(combined_message(describe_operation(eqn, self.around), track.place))
        if is_container(eqn) and any(track.is_apart for track in tracks):
            inside = self._followed_inside(eqn, operands)
            if inside is not None:
                return [where.rows for where in inside]
        conflicts: list[Any] = []
        primals = [value.primal for value in operands]
        supports = [support_of(value) for value in operands]
        args = eqn, tracks, actives, primals, supports, self.num_rows, conflicts
        found = self._remembered(_layout_of(eqn, tracks), lambda: rows_after(*args, self.shares))
        self.count_conflicts(conflicts)
        apart = [active for track, active in zip(tracks, actives) if active and track.is_apart]
        lost = [track.place.reason for track in found if isinstance(track.place, Mixed)]
        if lost and eqn.primitive.name in FOLLOWED:
            moved = self._apart(eqn, operands, FOLLOWED[eqn.primitive.name])
            if moved is not None:
                return moved
        sums = all(isinstance(track.place, Mixed) and track.place.is_sum for track in found)
        # The rule of a custom_vjp function decides what its operands are given, and was followed.
        is_checked = eqn.primitive.name == "custom_vjp_call"
        if len(apart) > 1 and lost and not sums and not is_checked and not self.shares:
            raise RowAxisError(several_message(describe_operation(eqn, self.around), lost[0]))
        checked = eqn.primitive.name in CHECKS and not self._shares(eqn, operands)
        if any(actives) and not lost and checked:
            self._check_rule(eqn, tracks, actives)
        return found

    def _followed_rule(self, eqn, operands, error: RowAxisError) -> list[Track]:
        """Rows that do not stay in place in a derivative rule, or ``error``."""
        if eqn.primitive.name in FOLLOWED:
            try:
                found = self._apart(eqn, operands, FOLLOWED[eqn.primitive.name])
            except RowAxisError:  # it does not name the rule
                raise error from None
            if found is not None:
                return found
        raise error

    def _shares(self, eqn, operands) -> bool:
        """Whether rows may be mixed: but for what has parameters, and needs rows in its rule."""
        has_rule = eqn.primitive.name in CHECKS and any(value.tangents for value in operands)
        return self.shares and not has_rule

    def _remembered(self, key: Any, function: Callable[[], Any]) -> Any:
        """The same arrays again for the same ``key``: by them, equal numbers are known as such."""
        if key is None:
            return function()
        name, ids = key
        if (name, id(ids)) not in self._memory:
            self._memory[name, id(ids)] = ids, function()
        return self._memory[name, id(ids)][1]

    def settled(self, track: Track) -> Track:
        if not isinstance(track.place, Moved):
            return settled(track)
        found = self._remembered(("settled", track.ids), lambda: settled(track))
        return self._remembered(("settled", found.ids), lambda: found)

    def _check_rule(self, eqn, tracks: Sequence[Track], actives) -> None:
        """What holds of rows in a derivative rule must hold along every axis that tells rows apart,
        as if there were one row per place."""
        axes = {
            k: [
                (axis, size)
                for axis, size in enumerate(ids_of(track, shape_of(var), self.num_rows).shape)
                if size > 1
            ]
            for k, (track, var) in enumerate(zip(tracks, eqn.invars))
            if track.is_apart
        }
        if len({tuple(size for _, size in own) for own in axes.values()}) > 1:
            raise RowAxisError(
                f"{describe_operation(eqn, self.around)} has a derivative rule of its own, and "
                "operands in which rows are told apart along different axes. Bring them into one "
                "order before."
            )
        for along in zip(*axes.values()):
            infos: list[RowInfo] = [None] * len(tracks)
            for k, (axis, _) in zip(axes, along):
                infos[k] = Rows(axis)
            count = as_many(along[0][1], self.num_rows)
            rows = propagate(eqn, infos, count)
            CHECKS[eqn.primitive.name](eqn, infos, actives, rows, count)

    def _followed_inside(self, eqn, operands) -> list[Where] | None:
        """Where rows and positions go inside of a call or a loop."""
        handler = HANDLERS.get(eqn.primitive.name)
        if handler is None or eqn.primitive.name in ("shard_map", "while"):
            return None
        return [value.where for value in self._apart(eqn, operands, handler)]

    def check_sums(self, eqn, operands) -> None:
        """An error where the rule of a function that sums over rows mixes those of its operands."""
        if self.follows and not self.shares:
            self._apart(eqn, operands, FOLLOWED[eqn.primitive.name], checks_sums=True)

    def _apart(self, eqn, operands, function, *, checks_sums: bool = False) -> Any:
        """``function`` of a walk of its own, whose conflicts count here.

        It is asked where rows go, not differentiated: what is inside need have no derivative.
        """
        walk = self.inside(f"{self._prefix}rows{len(self.conflicts)}")
        walk.named_meetings = {}
        walk.around = (eqn, *self.around)
        walk.checks_sums = checks_sums or not any(value.tangents for value in operands)
        values = [
            dataclasses.replace(
                value,
                primal=jax.lax.stop_gradient(value.primal),
                tangents={},
                active=value.active or bool(value.tangents),
            )
            for value in operands
        ]
        if eqn.primitive.name not in CALLS:
            values = unsupported(values)
        found = function(walk, eqn, values)
        self.conflicts.update(walk.conflicts)
        return found

    def count_conflicts(self, counts: list[Any]) -> None:
        for count in counts:
            self.conflicts[f"{self._prefix}{len(self.conflicts)}"] = count


def _layout_of(eqn: Any, tracks: Sequence[Track]) -> tuple[Any, Any] | None:
    """A key for what an operation does that changes no more than layout."""
    if eqn.primitive.name not in LAYOUTS or not isinstance(tracks[0].place, Moved):
        return None
    shapes = [shape_of(var) for var in (eqn.invars[0], *eqn.outvars)]
    return (eqn.primitive.name, str(eqn.params), str(shapes), tracks[0].place), tracks[0].ids
