"""The walk: evaluates a jaxpr with a channel wherever a parameter first meets data.

What depends on parameters alone is pushed forward along the direction; what depends on the batch is
evaluated as it is. Nothing here knows about layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
from ghostjax._walk._inside import inside, is_container
from ghostjax._walk._lookups import promises
from ghostjax._walk._meeting import (
    Tangents,
    attach_channel,
    is_inexact,
    one_per_row,
    push_forward,
)
from ghostjax._walk._rows import Mixed, RowInfo, Rows, propagate
from ghostjax._walk._values import Value

WAY_OUT = (
    "Write the loss for one row and pass per_example=True, which needs no row axis, or keep one "
    "row per place along an axis."
)


class Walk:
    """One evaluation. ``num_rows`` is None where the jaxpr is that of a single row."""

    def __init__(self, taps: dict[str, Any], shared: dict[str, Any], num_rows: int | None):
        self.taps = taps
        self.shared = shared
        self.num_rows = num_rows

    def run(self, closed: core.ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """The values of a jaxpr's outputs."""
        return self.open(closed.jaxpr, [Value(const) for const in closed.consts], operands)

    def open(self, jaxpr: core.Jaxpr, consts: Sequence[Value], operands: Sequence[Value]):
        variables = [*jaxpr.constvars, *jaxpr.invars]
        env = dict(zip(variables, [*consts, *operands], strict=True))

        def read(atom):
            return env[atom] if is_var(atom) else Value(atom.val)

        for eqn in jaxpr.eqns:
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
            return HANDLERS[name](self, eqn, operands)
        if not has_data:
            return self.parameters_only(eqn, operands)
        if is_container(eqn) and name != "custom_jvp_call":
            raise NotImplementedError(
                f"{describe_operation(eqn)} uses parameters ({', '.join(paths_of(operands))}) "
                "together with the batch, and cannot be walked. Move the parameters out of it."
            )
        return self.operation(eqn, operands, Tangents)

    def without_parameters(self, eqn, operands, has_data):
        outputs = bind(eqn, [value.primal for value in operands])
        if not has_data:
            return [Value(output) for output in outputs]
        rows = self.rows_after(eqn, operands)
        active = any(value.active for value in operands) and eqn.primitive.name != "stop_gradient"
        return [
            Value(output, {}, self.num_rows is None or info is not None, active, info)
            for output, info in zip(outputs, rows)
        ]

    def parameters_only(self, eqn, operands, tangents_of=None):
        function = functools.partial(bind, eqn)
        outputs = bind(eqn, [value.primal for value in operands])
        if eqn.primitive.name == "stop_gradient":
            return [Value(output) for output in outputs]
        if tangents_of is None and promises(eqn):
            tangents_of = Tangents
        tangents: list[dict[str, Any]] = [{} for _ in outputs]
        for path in paths_of(operands):
            if tangents_of is None:
                moved = push_forward(function, operands, path)[1]
            else:
                made = tangents_of(function, operands, path)
                moved = made(made.operands)
            for output, found, tangent in zip(outputs, tangents, moved):
                if is_inexact(output):
                    found[path] = tangent
        return [Value(output, found) for output, found in zip(outputs, tangents)]

    def operation(self, eqn, operands, tangents_of):
        """An ordinary operation where parameters and data meet: the channel is here."""
        rows = self.rows_after(eqn, operands)
        outputs = bind(eqn, [value.primal for value in operands])
        tangents = {
            path: tangents_of(functools.partial(bind, eqn), operands, path)
            for path in paths_of(operands)
        }
        return self.channels(eqn, outputs, tangents, rows)

    def promote(self, value: Value, rows: RowInfo, eqn: Any = None) -> Value:
        """A parameter-only value on its way to where values of its kind are data."""
        if not value.tangents:
            return Value(value.primal, {}, True, value.active, rows)
        tangents = {
            path: Tangents(lambda operands: list(operands), [value], path)
            for path in value.tangents
        }
        return self.channels(eqn, [value.primal], tangents, [rows])[0]

    def channels(self, eqn, outputs, tangents, rows) -> list[Value]:
        """Values of ``outputs``, with a tap each for the paths of ``tangents``."""
        in_rows, in_no_row = {}, {}
        for path, found in tangents.items():
            inexact = [
                (output, info)
                for output, info in zip(outputs, rows)
                if jnp.issubdtype(jnp.result_type(output), jnp.inexact)
            ]
            if self.num_rows is None or all(isinstance(info, Rows) for _, info in inexact):
                in_rows[path] = found
            elif not found.needs_data and all(jnp.ndim(output) == 0 for output, _ in inexact):
                in_no_row[path] = found
            else:
                raise RowAxisError(_lost(eqn, path, [info for _, info in inexact]))
        if in_rows and self.num_rows is None:
            outputs = one_per_row(outputs, self.taps[next(iter(in_rows))])
        if in_rows:
            outputs = attach_channel(outputs, in_rows, rows, self.taps, self.num_rows)
        if in_no_row:
            nowhere = [None] * len(outputs)
            outputs = attach_channel(outputs, in_no_row, nowhere, self.shared, None)
        return [Value(output, {}, True, True, info) for output, info in zip(outputs, rows)]

    def rows_after(self, eqn, operands) -> list[RowInfo]:
        if self.num_rows is None:
            return [None] * len(eqn.outvars)
        return check_rows(
            eqn,
            [value.rows for value in operands],
            [value.active or bool(value.tangents) for value in operands],
            self.num_rows,
        )


def check_rows(eqn, infos, actives, num_rows) -> list[RowInfo]:
    """Rows of the outputs; an error where rows that carry gradient are mixed into other rows."""
    has_rows = any(isinstance(info, Rows) for info in infos)
    if has_rows:
        for info, active in zip(infos, actives):
            if active and isinstance(info, Mixed):
                raise RowAxisError(
                    f"{describe_operation(eqn)} combines rows with a value in which rows are mixed "
                    f"({info.reason}), so that no row has a gradient of its own. {WAY_OUT}"
                )
    if any(actives):
        for jaxpr, *given in inside(eqn, infos, actives, num_rows):
            _check_inside(jaxpr, *given, num_rows)
    rows = propagate(eqn, infos, num_rows)
    both = [active for info, active in zip(infos, actives) if active and isinstance(info, Rows)]
    lost = [info.reason for info in rows if isinstance(info, Mixed)]
    if len(both) > 1 and lost and not is_container(eqn):
        raise RowAxisError(
            f"{describe_operation(eqn)} combines rows with other rows ({lost[0]}), so that no row "
            f"has a gradient of its own. {WAY_OUT}"
        )
    if any(actives) and has_rows and eqn.primitive.name in CHECKS:
        CHECKS[eqn.primitive.name](eqn, infos, actives, rows, num_rows)
    return rows


def _check_inside(jaxpr, infos, actives, num_rows):
    pairs = zip(infos, actives, strict=True)
    known = dict(zip(jaxpr.invars, pairs, strict=True))
    for inner in jaxpr.eqns:
        pairs = [
            known.get(atom, (None, False)) if is_var(atom) else (None, False)
            for atom in inner.invars
        ]
        active = any(active for _, active in pairs) and inner.primitive.name != "stop_gradient"
        rows = check_rows(inner, *([list(side) for side in zip(*pairs)] or [[], []]), num_rows)
        known.update((var, (info, active)) for var, info in zip(inner.outvars, rows))


def stack_rows(info: RowInfo) -> RowInfo:
    """Rows of slices stacked along a new leading axis."""
    if isinstance(info, Rows):
        return Rows(info.axis + 1, info.outer, info.inner)
    return info


def paths_of(operands: Sequence[Value]) -> list[str]:
    return sorted({path for value in operands for path in value.tangents})


def _lost(eqn, path, infos) -> str:
    reasons = [info.reason for info in infos if isinstance(info, Mixed)]
    return (
        f"parameter {path} meets data in {describe_operation(eqn)}, whose result has no axis with "
        f"one row per place ({'; '.join(reasons) or 'it depends on no row'}). {WAY_OUT}"
    )


def _call(walk: Walk, eqn, operands):
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
