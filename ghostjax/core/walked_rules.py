"""Functions whose backward rule sums over rows in a loop, as losses in chunks do.

With R(w, x, c) what the rule gives the parameters, G the direction, and e_i the weight of row i
where R sums over rows,

    dots[i] = d < R , G > / d e_i

as R is linear in these weights: so the rule is walked, with weights, and what it gives is
differentiated with G as cotangents. A round of a loop is made again there, as the rule makes it, so
that no more than one chunk is held.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import bind, describe_operation, is_inexact
from ghostjax.core.custom_rules import in_rule, not_a_sum
from ghostjax.core.devices import crosses
from ghostjax.core.examples import Regrouped, weights_of
from ghostjax.core.linear import Kind, NotLinearError, kinds_of_outputs
from ghostjax.core.meeting import (
    Cells,
    Meeting,
    Route,
    weighted,
    where_taken,
    wide_dtype,
)
from ghostjax.core.mixing import WAY_OUT
from ghostjax.core.place_rules import shape_of
from ghostjax.core.program import run
from ghostjax.core.reach import inputs_of
from ghostjax.core.rule_walk import RuleWalk, of_whole_rows
from ghostjax.core.rules import pullback
from ghostjax.core.squares import square
from ghostjax.core.tracks import Moved, Where, axes_apart, ids_of, merged
from ghostjax.core.values import Value

# How many sums over rows a rule is expected to have at most.
_SUMS = 16


class WalkedRule(Meeting):
    """The meeting of parameters with such a function, whose outputs have no rows.

    Args:
      walk: that of the loss.
    """

    in_branch = False
    use = None
    _every = False

    def __init__(
        self,
        walk: Any,
        eqn: Any,
        operands: Sequence[Value],
        outputs: Sequence[Any],
        places: Sequence[Where],
    ):
        self._given = [
            of_whole_rows(where, len(output.shape))
            if walk.labels and where.rows.is_apart and not where.positions
            else where
            for where, output in zip(places, outputs)
            if is_inexact(output)
        ]
        self._labels, self.place = walk.labels, walk.describe(eqn)
        self.count = walk.labels.count if walk.labels else walk.num_rows
        function, rows = functools.partial(bind, eqn), [None] * len(outputs)
        super().__init__(eqn, function, operands, outputs, rows, walk.num_rows, walk.names)
        self.in_rows = dict.fromkeys(self.moving, True)
        walk.count_conflicts(self._conflicts)
        del self._conflicts

    def _prepare(self, function, operands):
        del function
        active = [
            (value.active or bool(value.tangents)) and is_inexact(var)
            for value, var in zip(operands, self.eqn.invars)
        ]
        program = pullback(self.eqn, active, active)
        if any(where.rows.is_apart for where in self._given):
            # Another device has other rows at the same places.
            over = [step.eqn for step in program.steps if crosses(step.eqn, self.num_rows)]
            if over:
                raise RowAxisError(f"{describe_operation(over[0])} goes over the devices of rows")
        self.kept = [k for k in range(len(operands)) if program.inputs[k] in program.used]
        self.needs_data = True
        self._consts = program.consts
        self._program = dataclasses.replace(program, consts=dict.fromkeys(program.consts))
        self._active = [k for k, is_active in enumerate(active) if is_active]
        self._classes = [
            Value(None, {}, v.is_data or bool(v.tangents), is_active, v.where)
            for v, is_active in zip(operands, active)
        ]
        self._avals = [var.aval for var in self.eqn.invars]
        self._check([value.primal for value in operands])

    def _check(self, primals) -> None:
        """Finds to which parameter what is summed contributes, and that the rest is linear."""
        kept = self._kept(primals, list(self._consts.values()))
        given = [self.outputs[k] for k in self.differentiable]
        cotangents = [jnp.zeros(like.shape, like.dtype) for like in given]
        try:
            self._find_owners(kept, cotangents, every=False)
        except NotLinearError as error:
            try:
                self._find_owners(kept, cotangents, every=True)
            except (NotLinearError, RowAxisError):
                if error.eqn is None:
                    raise
                raise not_a_sum(self.eqn, self._named, error) from None

    @property
    def _named(self):
        return ", ".join(self.names[path] for path in self.moving)

    def _find_owners(self, kept, cotangents, every: bool) -> None:
        self._every = every
        keys: dict[str, int] = {}
        ones = [jnp.ones(())] * _SUMS

        def outputs_of(weights, cotangents):
            def weigh(key, meeting, operands):
                number = keys.setdefault(key, len(keys))
                if number >= len(weights):  # traced again with more
                    return [operands[0].primal]
                return [operands[0].primal * weights[number].astype(operands[0].primal.dtype)]

            walk = self._walk(kept)
            walk.weigh = weigh
            found = self._walked(walk, kept, cotangents)
            conflicts = self._brought_home(walk, found)
            return [found[k].primal for k in self._moving], [*walk.conflicts.values(), *conflicts]

        closed, count = jax.make_jaxpr(outputs_of)(ones, cotangents), len(self._moving)
        if len(keys) > len(ones):
            ones = [jnp.ones(())] * len(keys)
            closed = jax.make_jaxpr(outputs_of)(ones, cotangents)
        given = [Kind.LINEAR] * len(ones) + [Kind.FIXED] * len(cotangents)
        kinds = kinds_of_outputs(closed.jaxpr, given, count)
        if Kind.FIXED in kinds:
            raise NotLinearError(None)
        self._owners: dict[int, set[str]] = {}
        for path, moving in self.moving.items():
            wanted = [k in moving for k in self._moving]
            wanted += [False] * (len(closed.jaxpr.outvars) - count)
            reached = inputs_of(closed.jaxpr, wanted)
            self._owners[path] = {key for key, own in zip(keys, reached[: len(keys)]) if own}
        self._conflicts = []
        if len(closed.jaxpr.outvars) > count:
            self._conflicts = core.jaxpr_as_fun(closed)(*ones, *cotangents)[count:]

    @property
    def _moving(self) -> list[int]:
        return sorted({k for own in self.moving.values() for k in own})

    def _kept(self, primals, consts):
        arrays = {k: primals[k] for k in self.kept}
        wheres = {k: self._classes[k].where for k in self._active + self.kept}
        return arrays, consts, wheres, self._given, self._labels

    def keep(self, operands):
        kept = self._kept([value.primal for value in operands], self.take_consts())
        self._classes = [dataclasses.replace(value, where=None) for value in self._classes]
        self._labels = self._given = None
        return kept

    def take_consts(self):
        consts = list(self._consts.values())
        del self._consts
        return consts

    def _walk(self, kept) -> RuleWalk:
        labels, paths = kept[-1], list(self.moving)
        return RuleWalk(self.names, self.num_rows, labels, paths, self.place, every=self._every)

    def _walked(self, walk: RuleWalk, kept, cotangents) -> dict[int, Value]:
        """By position, what the rule gives the operands."""
        arrays, consts, wheres, given, _ = kept
        program, count = self._program, len(self._classes)
        given = [
            Value(array, {}, True, True, where) if where.rows.is_apart else Value(array)
            for array, where in zip(cotangents, given, strict=True)
        ]
        env = dict(zip(program.inputs[count:], given, strict=True))
        env.update(zip(program.consts, map(Value, consts), strict=True))
        for k in self.kept:
            value = dataclasses.replace(self._classes[k], primal=arrays[k], where=wheres[k])
            env[program.inputs[k]] = value

        def evaluate(eqn, atoms):
            with eqn.ctx.manager:
                return walk.equation(eqn, [a if isinstance(a, Value) else Value(a) for a in atoms])

        try:
            read = run(program.steps, env, evaluate)
        except RowAxisError as error:
            raise in_rule(self.eqn, "backward", error) from None
        found = {}
        for k, atom in zip(self._active, program.outputs, strict=True):
            value = read(atom)
            value = value if isinstance(value, Value) else Value(jnp.asarray(value))
            if k in self._moving and walk.is_apart(value):
                if not value.active:  # as what integers were made of
                    raise NotLinearError(None)
                value = walk.weighted(value)
            found[k] = value
        return found

    def _brought_home(self, walk: RuleWalk, found: dict[int, Value]) -> list[Any]:
        """How often what the rule gives data has its rows not where these have them."""
        counts = []
        for k, value in found.items():
            track = self._classes[k].where.rows
            if k in self._moving or not track.is_apart or not value.is_data:
                continue
            if not value.where.rows.is_apart:
                reason = getattr(value.rows, "reason", "it depends on no row")
                raise RowAxisError(
                    f"in the backward rule of {self.place}: rows are not brought back to where "
                    f"they were ({reason}). {WAY_OUT}"
                )
            shape = shape_of(self.eqn.invars[k])
            pair = [ids_of(t, shape, self.num_rows) for t in (value.where.rows, track)]
            counts.append(jnp.sum(jnp.asarray(merged(*pair)[1]), dtype=jnp.int32))
        return counts

    def route(self, directions, *, late):
        del directions, late
        return Route.RULE

    def has_rest(self, path):
        del path
        return True

    def parted(self, path, sums):
        del path
        return sums

    def sums(self, kept, vectors, cotangents, stacked, route):
        """By parameter, the dots of examples and those of nobody."""
        del route
        found = {}
        for paths in self._groups(vectors):
            found |= self._sums(kept, {p: vectors[p] for p in paths}, cotangents, stacked)
        return found

    def _groups(self, paths) -> list[list[int]]:
        """Parameters that share no sum come out of one pass."""
        owned = [self._owners[path] for path in paths]
        together = sum(map(len, owned)) == len(set().union(*owned))
        return [list(paths)] if together else [[path] for path in paths]

    def _sums(self, kept, vectors, cotangents, stacked):
        wide = wide_dtype(*(v for own in vectors.values() for v in own))
        taps = {path: jnp.zeros(self.count, wide) for path in vectors}
        shared = {path: jnp.zeros((), wide) for path in vectors}

        def outputs_of(taps, shared):
            walk = self._walk(kept)
            walk.taps, walk.shared = taps, shared
            walk.owners = {key: path for path in vectors for key in self._owners[path]}
            outputs = self._walked(walk, kept, cotangents)
            return {
                path: [outputs[k].primal.astype(self._avals[k].dtype) for k in self.moving[path]]
                for path in vectors
            }

        _, pull = jax.vjp(outputs_of, taps, shared)
        taps, shared = (jax.vmap(pull) if stacked else pull)(vectors)
        return {path: (taps[path], shared[path]) for path in vectors}

    def weighted(self, weights, kept, cotangents) -> dict[int, Any]:
        """By position, the gradient of the moving operands by all examples times their weights."""
        walk = self._walk(kept)
        walk.weigh = functools.partial(_weighed, weights)
        outputs = self._walked(walk, kept, cotangents)
        found = {k: outputs[k].primal.astype(self._avals[k].dtype) for k in self._moving}
        return where_taken(found, cotangents) if self.in_branch else found

    def gradient(self, example, kept, cotangents) -> dict[int, list[Any]]:
        """By parameter, that of one example, or of all times the weights ``example``."""
        weights = example if jnp.ndim(example) else jnp.arange(self.count) == example
        found = self.weighted(weights, kept, cotangents)
        return {path: [found[k] for k in own] for path, own in self.moving.items()}

    def squares(self, kept, cotangents) -> dict[int, Any]:
        """By parameter, squared norms; one example after another."""

        def of_example(number):
            found = self.gradient(number, kept, cotangents)
            return {path: sum(map(square, own)) for path, own in found.items()}

        return jax.lax.map(of_example, jnp.arange(self.count))


def _weighed(weights, key, meeting, operands) -> list[Any]:
    """A value whose examples are multiplied with their weights."""
    del key
    array = operands[0].primal
    if not isinstance(meeting, Regrouped):
        return [weighted(array, meeting.rows[0], meeting.num_rows, weights)]
    _, ids = meeting.keep(operands)
    cells = Cells(tuple(axes_apart(Moved(ids.shape))))
    return [weighted(array, cells, None, weights_of(ids, weights, meeting.count))]
