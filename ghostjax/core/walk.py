"""The walk: goes through a jaxpr and finds where parameters meet data.

What depends on parameters alone is pushed forward along the direction; what depends on the batch is
evaluated as it is. Nothing here knows about layers.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax.numpy as jnp
from jax.extend import core

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import (
    bind,
    describe_operation,
    holds,
    inner_jaxprs,
    is_var,
)
from ghostjax.core.devices import where_traced
from ghostjax.core.inside import inside, is_container
from ghostjax.core.meeting import Meeting, is_inexact
from ghostjax.core.places import Mixed, RowInfo, Rows, propagate
from ghostjax.core.routes import KINDS, make_meeting
from ghostjax.core.values import Value, paths_of

WAY_OUT = (
    "Keep one row per place along an axis, or write the loss for one row and pass per_example=True "
    "to value_grad_and_dots, which then needs no row axis."
)


class Walk:
    """What all walks have in common. A subclass says what a parameter-only value carries beside its
    primal, and what a meeting does.

    Attributes:
      names: of the parameters, for messages.
      named_meetings: by the name of a jitted function, the kind of meeting that its calls are.
      num_rows: B; None where the jaxpr is that of a single row.
      checks_rows: whether rows that are mixed are an error; another walk may have looked.
      stacked: whether tangents have a leading axis of directions.
      emitted: by meeting, arrays for the time after the walk. From loops they come stacked.
      specs: by meeting, zeros like the cotangents that are to be kept.
      takes_shared: whether dots may belong to no row.
      enters_shard_map: whether parameters and data may meet in a ``shard_map``.
      arrays_of_rows, other_arrays: names of the attributes that hold arrays, with the rows along
        their last axis or without rows.
      around: the calls that are being walked, the innermost first, for messages.
    """

    computes_data = True
    checks_rows = True
    takes_shared = True
    enters_shard_map = True
    around: tuple[Any, ...] = ()
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
        self._prefix, self._count = "", 0

    def inside(self, key: str, slots: dict[str, Any] | None = None) -> Self:
        """A walk of the same kind for the body of a loop, a branch, or what is rematerialised."""
        walk = copy.copy(self)
        walk.emitted, walk.specs, walk._prefix, walk._count = {}, {}, f"{key}.", 0
        walk.slots = slots
        return walk

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

    def data(self, primal: Any, active: bool, rows: RowInfo) -> Value:
        return Value(primal if self.computes_data else None, {}, True, active, rows)

    def zero_tangent(self, primal: Any, like: Any) -> Any:
        """What a value carries for a parameter that it does not depend on, but ``like`` does."""
        return None

    def run(self, closed: core.ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """The values of a jaxpr's outputs."""
        return self.open(closed.jaxpr, [Value(const) for const in closed.consts], operands)

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
        if not any(value.tangents for value in operands):
            return self.without_parameters(eqn, operands, has_data)
        name = eqn.primitive.name
        # Of parameters alone, forward mode takes everything but a custom_vjp function.
        if name in HANDLERS and (has_data or holds(eqn, "custom_vjp_call")):
            outside, self.around = self.around, (eqn, *self.around)
            outputs = HANDLERS[name](self, eqn, operands)
            self.around = outside
            return outputs
        if not has_data:
            return self.parameters_only(eqn, operands)
        if is_container(eqn) and name not in ("custom_jvp_call", *KINDS):
            raise NotImplementedError(
                f"{self.describe(eqn)} uses parameters ({self.named(operands)}) "
                "together with the batch, and cannot be walked. Move the parameters out of it."
            )
        return self.operation(eqn, operands)

    def without_parameters(self, eqn, operands, has_data):
        if not has_data:
            return [Value(output) for output in bind(eqn, [value.primal for value in operands])]
        rows = self.rows_after(eqn, operands)
        is_data = [self.num_rows is None or info is not None for info in rows]
        outputs = [None] * len(rows)
        if self.computes_data or not all(is_data):
            outputs = bind(eqn, self._without_data(eqn, operands))
        active = any(value.active for value in operands) and eqn.primitive.name != "stop_gradient"
        return [
            self.data(output, active, info) if found else Value(output)
            for output, info, found in zip(outputs, rows, is_data)
        ]

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
        if eqn.primitive.name == "stop_gradient":
            return [Value(output) for output in outputs]
        found = self.pushed(eqn, functools.partial(bind, eqn), operands, outputs)
        direct = _is_layout(eqn) and operands[0].direct
        return [Value(output, tangents, direct=direct) for output, tangents in zip(outputs, found)]

    def operation(self, eqn, operands, function=None) -> list[Value]:
        """An ordinary operation where parameters and data meet, evaluated by ``function``."""
        rows = self.rows_after(eqn, operands)
        outputs = [var.aval for var in eqn.outvars]
        function = function or functools.partial(bind, eqn)
        return self.meet(eqn, function, operands, outputs, rows)

    def promote(self, value: Value, rows: RowInfo, eqn: Any = None) -> Value:
        """A parameter-only value on its way to where values of its kind are data."""
        if not value.tangents:
            return self.data(value.primal, value.active, rows)
        return self.meet(eqn, list, [value], [value.primal], [rows])[0]

    def meet(self, eqn, function, operands, outputs, rows) -> list[Value]:
        meeting = self.make(eqn, function, operands, outputs, rows)
        infos = [rows[position] for position in meeting.differentiable]
        scalars = all(not meeting.outputs[position].shape for position in meeting.differentiable)
        for path in meeting.moving:
            in_rows = self.num_rows is None or all(isinstance(info, Rows) for info in infos)
            is_shared = self.takes_shared and scalars and not meeting.needs_data
            if not in_rows and not is_shared:
                raise RowAxisError(_lost(self.describe(eqn), self.names[path], infos))
            meeting.in_rows[path] = in_rows
        outputs = self.attach(meeting, function, operands)
        return [self.data(output, True, info) for output, info in zip(outputs, rows)]

    def make(self, eqn, function, operands, outputs, rows) -> Meeting:
        return make_meeting(eqn, function, operands, outputs, rows, self.num_rows, self.names)

    def named_meeting(self, eqn, operands: Sequence[Value]) -> Any:
        """The kind of meeting that a call is by its name, None if it is to be walked."""
        kind = self.named_meetings.get(eqn.params.get("name"))
        if kind is None or not kind.fits(eqn, operands, self.rows_after(eqn, operands)):
            return None
        return kind

    def describe(self, eqn: Any) -> str:
        return "the loss" if eqn is None else describe_operation(eqn, self.around)

    def named(self, operands: Sequence[Value]) -> str:
        return ", ".join(self.names[path] for path in paths_of(operands))

    def rows_after(self, eqn, operands) -> list[RowInfo]:
        if self.num_rows is None:
            return [None] * len(eqn.outvars)
        infos = [value.rows for value in operands]
        if not self.checks_rows:
            return propagate(eqn, infos, self.num_rows)
        actives = [value.active or bool(value.tangents) for value in operands]
        return check_rows(eqn, infos, actives, self.num_rows, self.around)


def check_rows(eqn, infos, actives, num_rows, around=()) -> list[RowInfo]:
    """Rows of the outputs; an error where rows that carry gradient are mixed into other rows."""
    has_rows = any(isinstance(info, Rows) for info in infos)
    if has_rows:
        for info, active in zip(infos, actives):
            if active and isinstance(info, Mixed):
                raise RowAxisError(
                    f"{describe_operation(eqn, around)} combines rows with a value in which rows "
                    f"are mixed ({info.reason}), so that no row has a gradient of its own. "
                    "Statistics of the batch have to be constants, as the running averages of "
                    f"BatchNorm are. {WAY_OUT}"
                )
    if any(actives):
        for given in inside(eqn, infos, actives, num_rows):
            where_traced(eqn, functools.partial(_check_inside, *given, (eqn, *around)))
    rows = propagate(eqn, infos, num_rows)
    both = [active for info, active in zip(infos, actives) if active and isinstance(info, Rows)]
    lost = [info.reason for info in rows if isinstance(info, Mixed)]
    if len(both) > 1 and lost and not is_container(eqn):
        raise RowAxisError(
            f"{describe_operation(eqn, around)} combines rows with other rows ({lost[0]}), so that "
            f"no row has a gradient of its own. {WAY_OUT}"
        )
    if any(actives) and has_rows and eqn.primitive.name in CHECKS:
        CHECKS[eqn.primitive.name](eqn, infos, actives, rows, num_rows)
    return rows


def _check_inside(jaxpr, infos, actives, num_rows, around):
    pairs = zip(infos, actives, strict=True)
    known = dict(zip(jaxpr.invars, pairs, strict=True))
    for inner in jaxpr.eqns:
        pairs = [
            known.get(atom, (None, False)) if is_var(atom) else (None, False)
            for atom in inner.invars
        ]
        active = any(active for _, active in pairs) and inner.primitive.name != "stop_gradient"
        sides = [list(side) for side in zip(*pairs)] or [[], []]
        rows = check_rows(inner, *sides, num_rows, around)
        known.update((var, (info, active)) for var, info in zip(inner.outvars, rows))


def stack_rows(info: RowInfo) -> RowInfo:
    """Rows of slices stacked along a new leading axis."""
    if isinstance(info, Rows):
        return Rows(info.axis + 1, info.outer, info.inner)
    return info


def _lost(place, path, infos) -> str:
    reasons = [info.reason for info in infos if isinstance(info, Mixed)]
    return (
        f"parameter {path} meets data in {place}, whose result has no axis with "
        f"one row per place ({'; '.join(reasons) or 'it depends on no row'}). {WAY_OUT}"
    )


def _is_layout(eqn) -> bool:
    """Whether an equation changes no more than layout and dtype."""
    sizes = [math.prod(getattr(var.aval, "shape", ())) for var in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name in _LAYOUTS and len(set(sizes)) == 1


_LAYOUTS = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "squeeze", "transpose"]
)


def _call(walk: Walk, eqn, operands):
    if walk.named_meeting(eqn, operands):
        # Not as a call: its cotangents would be added up apart, and round otherwise.
        opened = core.jaxpr_as_fun(eqn.params["jaxpr"])
        return walk.operation(eqn, operands, lambda primals: opened(*primals))
    ((jaxpr, _),) = inner_jaxprs(eqn)
    closed = next(
        (value for value in eqn.params.values() if isinstance(value, core.ClosedJaxpr)), None
    )
    if closed is not None:
        return walk.run(closed, operands)
    return walk.open(jaxpr, [], operands)


HANDLERS = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
}
# By primitive: ``check(eqn, infos, actives, rows, num_rows)`` of what only derivatives do.
CHECKS: dict[str, Callable[..., None]] = {}
