"""The walk: goes through a jaxpr and finds where parameters meet data.

What depends on parameters alone is pushed forward along the direction; what depends on the batch is
evaluated as it is. Nothing here knows about layers.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import (
    CALLS,
    bind,
    describe_operation,
    holds,
    inner_jaxprs,
    is_inexact,
    is_var,
    stops,
)
from ghostjax.core.devices import as_many
from ghostjax.core.examples import Regrouped, cells_of, labels_of, localized
from ghostjax.core.inside import is_container
from ghostjax.core.meeting import Cells, Meeting
from ghostjax.core.mixing import (
    gives_nothing,
    lost_message,
    no_position_message,
    several_axes_message,
)
from ghostjax.core.places import BODIES, Mixed, Rows
from ghostjax.core.promises import is_promise
from ghostjax.core.routes import FOLLOWING, KINDS, SUMMING, make_meeting
from ghostjax.core.sums import sum_meeting, with_summands
from ghostjax.core.support import LAYOUTS, marked, support_after
from ghostjax.core.tracking import HANDLERS, Tracking
from ghostjax.core.tracks import SEVERAL, Track, Where
from ghostjax.core.values import Value, paths_of, unsupported

# Containers that are operations to a derivative: what JAX knows of them is a rule for the whole.
DIFFERENTIABLE = frozenset(["custom_jvp_call", "custom_linear_solve", "custom_vmap_call"])


class Walk(Tracking):
    """What all walks have in common. A subclass says what a parameter-only value carries beside its
    primal, and what a meeting does.

    Attributes:
      names: of the parameters, for messages.
      named_meetings: by the name of a jitted function, the kind of meeting that its calls are.
      computes_data: whether data are evaluated, or it is only found where they have rows.
      stacked: whether tangents have a leading axis of directions.
      slots: by meeting, what a subclass has for it.
      emitted: by meeting, arrays for the time after the walk. From loops they come stacked.
      specs: by meeting, zeros like the cotangents that are to be kept.
      in_branch: whether this is inside of a branch, which may not be taken.
      takes_shared: whether dots may belong to no row.
      takes_sums: whether parameters may meet sums over rows, which are taken apart there.
      no_shard_map: why parameters and data may not meet in a ``shard_map``, and what to do then.
      arrays_of_rows, other_arrays: names of the attributes that hold arrays, with the rows along
        their last axis or without rows.
    """

    computes_data = True
    in_branch = False
    takes_shared = True
    takes_sums = False
    no_shard_map: str | None = None
    stacked = False
    arrays_of_rows: tuple[str, ...] = ()
    other_arrays: tuple[str, ...] = ()
    slots: dict[str, Any] | None = None

    def __init__(
        self,
        names: Sequence[str],
        num_rows: int | None,
        named_meetings: dict[str, Any] | None = None,
    ):
        self.names = names
        self.num_rows = num_rows
        self.named_meetings = named_meetings or {}
        self.emitted: dict[str, Any] = {}
        self.specs: dict[str, Any] = {}
        self.conflicts: dict[str, Any] = {}
        self._prefix, self._count, self._memory = "", 0, {}

    def inside(self, key: str, slots: dict[str, Any] | None = None) -> Self:
        """A walk of the same kind for the body of a loop, a branch, or what is rematerialised."""
        walk = copy.copy(self)
        walk.emitted, walk.specs, walk.conflicts = {}, {}, {}
        walk._prefix, walk._count, walk._memory = f"{key}.", 0, {}
        walk.slots = slots
        return walk

    def results(self) -> tuple[dict[str, Any], ...]:
        """What the walk of a body has to hand on."""
        return self.emitted, self.specs, self.conflicts

    def receive(self, results: tuple[dict[str, Any], ...]) -> None:
        for own, found in zip(self.results(), results, strict=True):
            own.update(found)

    def next_key(self) -> str:
        """Names a meeting or a body by its place; the same in every walk of one jaxpr."""
        self._count += 1
        return f"{self._prefix}{self._count}"

    def slots_of(self, key: str) -> dict[str, Any] | None:
        """The slots of the meetings inside the body ``key``."""
        if self.slots is None:
            return None
        return {name: slot for name, slot in self.slots.items() if name.startswith(f"{key}.")}

    def pushed(self, eqn, function, operands: list[Value], outputs) -> list[dict[int, Any]]:
        """By output of a parameter-only equation, what it carries for every parameter."""
        del eqn, function
        paths = paths_of(operands)
        return [dict.fromkeys(paths) if is_inexact(output) else {} for output in outputs]

    def attach(self, meeting: Meeting, function, operands: list[Value]) -> list[Any]:
        """The outputs of a meeting."""
        raise NotImplementedError

    def data(self, primal: Any, active: bool, where: Where) -> Value:
        return Value(primal if self.computes_data else None, {}, True, active, where)

    def zero_tangent(self, primal: Any, like: Any) -> Any:
        """What a value carries for a parameter that it does not depend on, but ``like`` does."""
        return None

    def run(self, jaxpr: Any, operands: Sequence[Value]) -> list[Value]:
        """The values of a jaxpr's outputs; with constants, if it is closed."""
        consts = [Value(const) for const in getattr(jaxpr, "consts", ())]
        return self.open(getattr(jaxpr, "jaxpr", jaxpr), consts, operands)

    def one_round(self, body: core.ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """The same of a loop's body."""
        return self.run(body, operands)

    def open(self, jaxpr: core.Jaxpr, consts: Sequence[Value], operands: Sequence[Value]):
        variables = [*jaxpr.constvars, *jaxpr.invars]
        env = dict(zip(variables, [*consts, *operands], strict=True))

        def read(atom):
            return env[atom] if is_var(atom) else Value(atom.val)

        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:  # explicit axes of a mesh may be automatic around it
                outputs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        has_data = any(value.is_data for value in operands)
        if gives_nothing(eqn):
            if self.computes_data:  # once: by the walk that also computes what data depend on
                bind(eqn, [value.primal for value in operands])
            return []
        if not any(value.tangents for value in operands):
            return self.without_parameters(eqn, operands, has_data)
        name = eqn.primitive.name
        # Of parameters alone, forward mode takes everything but a custom_vjp function.
        if name in HANDLERS and (has_data or holds(eqn, "custom_vjp_call")):
            outside, self.around = self.around, (eqn, *self.around)
            if HANDLERS[name] is not _call:
                operands = unsupported(operands)
            outputs = HANDLERS[name](self, eqn, operands)
            self.around = outside
            return outputs if HANDLERS[name] is _call else unsupported(outputs)
        if not has_data:
            return self.parameters_only(eqn, operands)
        if is_container(eqn) and name not in (*DIFFERENTIABLE, *KINDS):
            raise NotImplementedError(
                f"{self.describe(eqn)} uses parameters ({self.named(operands)}) "
                "together with the batch, and cannot be walked. Move the parameters out of it."
            )
        return self.operation(eqn, operands)

    def without_parameters(self, eqn, operands, has_data):
        if not has_data:
            values = [Value(output) for output in bind(eqn, [value.primal for value in operands])]
            return marked(values, operands) if self.follows else values
        if self.follows and _is_simple_call(eqn, operands):
            return _call(self, eqn, operands)
        places = self.places_after(eqn, operands)
        is_data = [self.num_rows is None or where.rows.place is not None for where in places]
        outputs = [None] * len(places)
        if self.computes_data or not all(is_data):
            outputs = bind(eqn, self._without_data(eqn, operands))
        active = any(value.active for value in operands) and not stops(eqn)
        values = [
            self.data(output, active and is_inexact(var), where) if found else Value(output)
            for output, var, where, found in zip(outputs, eqn.outvars, places, is_data)
        ]
        if not self.follows:
            return values
        if not active:
            return marked(values, operands)
        if len(values) == 1:
            values = [dataclasses.replace(values[0], support=support_after(eqn, operands))]
        return with_summands(self, eqn, operands, values)

    def _without_data(self, eqn, operands):
        """Primals, with zeros for data that is not computed: outputs of no row do not use it."""
        return [
            jnp.zeros(var.aval.shape, var.aval.dtype)
            if value.is_data and not self.computes_data
            else value.primal
            for var, value in zip(eqn.invars, operands)
        ]

    def parameters_only(self, eqn, operands):
        outputs = bind(eqn, [value.primal for value in operands])
        if stops(eqn):
            return [Value(output) for output in outputs]
        found = self.pushed(eqn, functools.partial(bind, eqn), operands, outputs)
        direct = _is_layout(eqn) and operands[0].direct
        axes = _axes_after(eqn, operands[0].axes) if direct else None
        return [
            Value(output, tangents, direct=direct, axes=axes)
            for output, tangents in zip(outputs, found)
        ]

    def operation(self, eqn, operands, function=None) -> list[Value]:
        """An ordinary operation where parameters and data meet, evaluated by ``function``."""
        places = self.places_after(eqn, operands)
        outputs = [var.aval for var in eqn.outvars]
        function = function or functools.partial(bind, eqn)
        return self.meet(eqn, function, operands, outputs, places)

    def promote(self, value: Value, where: Where, eqn: Any = None) -> Value:
        """A parameter-only value on its way to where values of its kind are data."""
        if not value.tangents:
            return self.data(value.primal, value.active, where)
        if where.rows.is_apart and not isinstance(where.rows.place, Rows):
            # Rows are moved into its place, of which none is its own.
            where = Where(Track(Mixed("rows are moved there")))
        return self.meet(eqn, list, [value], [value.primal], [where])[0]

    def meet(self, eqn, function, operands, outputs, places: list[Where]) -> list[Value]:
        inexact = [k for k, output in enumerate(outputs) if is_inexact(output)]
        infos = [places[k].rows.place for k in inexact]
        in_rows = self.num_rows is None or all(self.has_examples(places[k]) for k in inexact)
        of_sum, name = None, None if eqn is None else eqn.primitive.name
        if not in_rows:
            of_sum = SUMMING[name](self, eqn, operands, outputs) if name in SUMMING else None
            of_sum = of_sum or sum_meeting(self, eqn, function, operands, outputs)
        if of_sum is not None:
            meeting = of_sum
        else:
            try:
                meeting = self._meeting(eqn, function, operands, outputs, places, in_rows)
            except RowAxisError as error:
                if not in_rows or name not in FOLLOWING:
                    raise
                meeting = FOLLOWING[name](self, eqn, operands, outputs, places, error)
        scalars = all(not meeting.outputs[position].shape for position in inexact)
        for path in meeting.moving if of_sum is None else ():
            is_shared = self.takes_shared and scalars and not meeting.needs_data
            if not (in_rows or is_shared or self.shares):
                given = self.describe(eqn), self.names[path], infos
                raise RowAxisError(lost_message(*given, is_factor=name in ("mul", "div")))
            meeting.in_rows[path] = in_rows
        outputs = self.attach(meeting, function, operands)
        flows = [k in inexact for k in range(len(outputs))]
        if in_rows and self.num_rows is not None:
            places = [Where(self.settled(where.rows), where.positions) for where in places]
        values = [self.data(*triple) for triple in zip(outputs, flows, places)]
        return with_summands(self, eqn, operands, values)

    def _meeting(self, eqn, function, operands, outputs, places, in_rows: bool) -> Meeting:
        infos = [w.rows.place for w, output in zip(places, outputs) if is_inexact(output)]
        if infos and in_rows and (self.labels or not all(isinstance(i, Rows) for i in infos)):
            return self.make_regrouped(eqn, function, operands, outputs, places)
        of_nobody = self.shares and not in_rows  # one sum, as of a single row
        rows = [None if of_nobody else where.rows.place for where in places]
        count = None if of_nobody else self.num_rows
        return self.make(eqn, function, operands, outputs, rows, count)

    def has_examples(self, where: Where) -> bool:
        """Whether places of a value belong to examples; of shares, what has none is of nobody."""
        return where.rows.is_apart and not (self.shares and self.labels and not where.positions)

    def make(self, eqn, function, operands, outputs, rows, num_rows) -> Meeting:
        return make_meeting(eqn, function, operands, outputs, rows, num_rows, self.names)

    def make_regrouped(self, eqn, function, operands, outputs, places) -> Regrouped:
        """A meeting whose rows are the places that labels, or moved rows, tell apart."""
        if self.num_rows is None:
            return self.make(eqn, function, operands, outputs, [None] * len(outputs), None)
        lost = no_position_message(self.describe(eqn), self.named(operands))
        found = {
            k: labels_of(where, jnp.shape(outputs[k]), self.num_rows, self.labels, lost)
            for k, where in enumerate(places)
            if is_inexact(outputs[k])
        }
        (cells, count), *others = {cells_of(ids) for ids in found.values()}
        if others:
            raise RowAxisError(several_axes_message(self.describe(eqn), self.named(operands)))
        is_rule = eqn is not None and eqn.primitive.name in KINDS
        local = operands
        if not (is_rule and isinstance(cells, Cells) and cells.axes):
            local = [
                dataclasses.replace(
                    value, where=localized(value.where, jnp.shape(value.primal), count)
                )
                for value in operands
            ]
        rows = [cells if k in found else None for k in range(len(outputs))]
        count = as_many(count, self.num_rows)
        meeting = self.make(eqn, function, local, outputs, rows, count)
        first = next(iter(found.values()))
        for ids in found.values():
            if not isinstance(ids, np.ndarray) and not self.shares:
                self.count_conflicts([jnp.sum(ids == SEVERAL, dtype=jnp.int32)])
            if ids is not first:
                self.count_conflicts([jnp.sum(jnp.ravel(ids) != jnp.ravel(first))])
        return self.regrouped(meeting, first)

    def regrouped(self, meeting: Meeting, ids: Any) -> Regrouped:
        return Regrouped(meeting, ids, self.labels.count if self.labels else self.num_rows)

    def named_meeting(self, eqn, operands: Sequence[Value]) -> Any:
        """The kind of meeting that a call is by its name, None if it is to be walked."""
        kind = self.named_meetings.get(eqn.params.get("name"))
        if kind is None:
            return None
        rows = [where.rows.place for where in self.places_after(eqn, operands)]
        if not kind.fits(eqn, operands, rows):
            return None
        return kind

    def describe(self, eqn: Any) -> str:
        return "the loss" if eqn is None else describe_operation(eqn, self.around)

    def named(self, operands: Sequence[Value]) -> str:
        return ", ".join(self.names[path] for path in paths_of(operands))


def _is_layout(eqn) -> bool:
    """Whether an equation changes no more than layout and dtype."""
    sizes = [math.prod(getattr(var.aval, "shape", ())) for var in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name in LAYOUTS and len(set(sizes)) == 1


def _axes_after(eqn, axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Of a layout, if no axes are merged or split."""
    if axes is None or eqn.primitive.name == "convert_element_type":
        return axes
    if eqn.primitive.name == "transpose":
        return tuple(axes[k] for k in eqn.params["permutation"])
    return None


def _call(walk: Walk, eqn, operands):
    if walk.named_meeting(eqn, operands):
        # Not as a call: its cotangents would be added up apart, and round otherwise.
        opened = core.jaxpr_as_fun(eqn.params["jaxpr"])
        return walk.operation(eqn, operands, lambda primals: opened(*primals))
    if walk.num_rows is not None and is_promise(eqn) and any(v.is_data for v in operands):
        return _promised(walk, eqn, operands)
    return walk.run(eqn.params[BODIES[eqn.primitive.name]], operands)


def _is_simple_call(eqn, operands: Sequence[Value]) -> bool:
    """Whether a call can be walked for what it multiplies with: without changing in which order
    cotangents are added up."""
    if HANDLERS.get(eqn.primitive.name) is not _call or is_promise(eqn):
        return False
    if not any(value.active for value in operands) or all(value.active for value in operands):
        return False
    ((jaxpr, _),) = inner_jaxprs(eqn)
    uses = [atom for inner in jaxpr.eqns for atom in inner.invars if is_var(atom)]
    return len(uses) == len(set(uses)) and not any(map(inner_jaxprs, jaxpr.eqns))


def _promised(walk: Walk, eqn, operands):
    """One meeting by its tangent: inside, rows are not known."""
    if holds(eqn, "custom_vjp_call"):
        raise NotImplementedError(
            f"{walk.describe(eqn)} is promised to keep rows in place and uses parameters "
            f"({walk.named(operands)}) beside a custom_vjp function, which has no tangent. Put "
            "rowwise around what cannot be followed alone, and the parameters outside."
        )
    opened = core.jaxpr_as_fun(eqn.params["jaxpr"])
    return walk.operation(eqn, operands, lambda primals: opened(*primals))


HANDLERS.update(dict.fromkeys(CALLS, _call))
