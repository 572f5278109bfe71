"""Functions with derivative rules of their own: the dots of their parameters, and their rows.

The backward rule of a ``custom_vjp`` function need not be linear in the cotangent: it may clip it,
round it or take its sign. But up to where it sums over rows for a parameter it keeps them in
place, and from there on it is linear. With u the values that are summed, c the cotangents and A the
linear rest, the gradient is A u(c), and < A u(c), direction > = < u(c), A^T direction >, whose
left factor has rows.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import bind, describe_operation, inner_jaxprs
from ghostjax._walk._linear import Kind, NotLinearError, is_real_or_complex
from ghostjax._walk._lookups import as_run
from ghostjax._walk._meeting import row_sums
from ghostjax._walk._program import Program, is_literal, run
from ghostjax._walk._rows import Mixed, RowInfo, Rows
from ghostjax._walk._rule_rows import Places, follow, kinds_of, split_at_sums
from ghostjax._walk._rules import pullback, pushforward
from ghostjax._walk._values import Value
from ghostjax._walk._walk import CHECKS, HANDLERS, WAY_OUT, Walk, paths_of


class RuleTangents:
    """What a backward rule gives a parameter, dotted with the direction row by row.

    ``operands`` is what the backward pass keeps, and the direction beside it.
    """

    needs_data = True

    def __init__(
        self,
        eqn: Any,
        values: Sequence[Value],
        rows: Sequence[RowInfo],
        path: str,
        num_rows: int | None,
    ):
        active = _active(eqn, [value.active or bool(value.tangents) for value in values])
        wanted = [path in value.tangents for value in values]
        self._program = pullback(eqn, active, wanted)
        used = {atom for step in self._program.steps for atom in step.inputs if _is_number(atom)}
        used.update(atom for atom in self._program.outputs if _is_number(atom))
        kept = {
            number: value.primal
            for number, value in zip(self._program.inputs, values)
            if number in used
        } | self._program.consts
        self._kept = list(kept)
        self._cotangents = self._program.inputs[len(values) :]
        self.operands = (
            list(kept.values()),
            [value.tangents[path] for value in values if path in value.tangents],
        )
        inexact = [info for info, var in zip(rows, eqn.outvars) if is_real_or_complex(var)]
        self._split = None
        if num_rows not in (None, 1) and all(isinstance(info, Rows) for info in inexact):
            infos = [*(value.rows for value in values), *inexact]
            places = _places(self._program, infos, active, set(self._cotangents))
            self._split = _split(eqn, self._program, places, path, num_rows)

    def sums(
        self,
        operands: tuple[list, list],
        cotangents: Sequence[Any],
        where: Sequence[RowInfo],
        num_rows: int | None,
    ) -> jax.Array:
        """< rule(cotangents), direction > by row, or in all where there is but one."""
        del where  # the rule's own values have their places
        arrays, direction = operands
        given = [array for array in cotangents if array is not None]
        env = dict(zip([*self._kept, *self._cotangents], [*arrays, *given], strict=True))
        if self._split is None:
            read = run(self._program.steps, env)
            grads = [jnp.ravel(read(atom)) for atom in self._program.outputs]
            return sum(
                row_sums(grad, jnp.ravel(vector), num_rows and Rows(0, 1, grad.size), num_rows)
                for grad, vector in zip(grads, direction, strict=True)
            )
        split = self._split
        run(split.before, env)

        def rest(*summed):
            read = run(split.after, env | dict(zip(split.summed, summed)), _evaluated)
            return [read(self._program.outputs[position]) for position in split.outputs]

        summed = [env[number] for number in split.summed]
        _, transposed = jax.vjp(rest, *summed)
        found = transposed([direction[position] for position in split.outputs])
        parts = zip(summed, found, split.summed.values())
        wide = jnp.float64 if direction[0].dtype == jnp.float64 else jnp.float32
        none = jnp.zeros(num_rows, wide)
        return sum((row_sums(*part, num_rows) for part in parts), none)


class ParameterRule:
    """The tangents of a ``custom_vjp`` function of parameters alone, whose rule must be linear."""

    def __init__(self, eqn: Any, function: Any, values: Sequence[Value], path: str):
        del function
        moving = [path in value.tangents for value in values]
        every = _active(eqn, [bool(value.tangents) for value in values])
        self._program = pullback(eqn, every, moving)
        self._outvars = eqn.outvars
        self._cotangents = self._program.inputs[len(values) :]
        _check_linear(eqn, self._program, self._cotangents, path)
        self.operands = (
            [value.primal for value in values],
            [value.tangents[path] for value in values if path in value.tangents],
        )

    def __call__(self, operands: tuple[list, list]) -> list[Any]:
        arrays, direction = operands
        env = dict(zip(self._program.inputs, arrays)) | self._program.consts

        def rule(cotangents):
            read = run(
                self._program.steps, env | dict(zip(self._cotangents, cotangents)), _evaluated
            )
            outputs = map(read, self._program.outputs)
            return [jnp.asarray(output, v.dtype) for output, v in zip(outputs, direction)]

        inexact = [var.aval for var in self._outvars if is_real_or_complex(var)]
        _, transposed = jax.vjp(rule, [jnp.zeros(aval.shape, aval.dtype) for aval in inexact])
        (tangents,) = transposed(direction)
        tangents = iter(tangents)
        return [next(tangents) if is_real_or_complex(var) else None for var in self._outvars]


def _function(eqn: Any) -> str:
    """The call and the function; of the operations in a backward rule JAX keeps no source line."""
    ((jaxpr, _),) = inner_jaxprs(eqn)
    info = getattr(jaxpr, "debug_info", None)
    source = getattr(info, "func_src_info", None) or ""
    return f"{describe_operation(eqn)} ({source})" if " at " in source else describe_operation(eqn)


def _is_number(atom: Any) -> bool:
    return not is_literal(atom)


def _evaluated(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """What is to be transposed: JAX lets nothing through ``stop_gradient``."""
    return list(operands) if eqn.primitive.name == "stop_gradient" else bind(as_run(eqn), operands)


def _active(eqn: Any, actives: Sequence[bool]) -> list[bool]:
    return [active and is_real_or_complex(atom) for atom, active in zip(eqn.invars, actives)]


def _places(
    program: Program, infos: Sequence[RowInfo], active: Sequence[bool], moving: set[int]
) -> Places:
    numbers = program.inputs
    flowing = {number for number, is_active in zip(numbers, active) if is_active}
    return Places(dict(zip(numbers, infos, strict=True)), moving, flowing)


def _split(eqn, program, places, path, num_rows):
    try:
        return split_at_sums(program, places, num_rows)
    except NotLinearError as error:
        raise RowAxisError(
            f"{_function(eqn)}: what its backward rule gives parameter {path} must be a sum over "
            f"rows, or linear in such sums. Found {_found(error)}, which is not, so that no row "
            "has a part of its own. Write the loss for one row and pass per_example=True, which "
            "takes any rule, or change the rule."
        ) from None
    except RowAxisError as error:
        raise _in_rule(eqn, "backward", error) from None


def _found(error: NotLinearError) -> str:
    if error.eqn is None:
        return "a part that depends on no cotangent"
    return describe_operation(error.eqn)


def _check_linear(eqn, program, cotangents, path):
    try:
        kind = kinds_of(program, program.steps, set(cotangents))
        if any(kind(atom) is Kind.FIXED for atom in program.outputs):
            raise NotLinearError(None)
    except NotLinearError as error:
        raise NotImplementedError(
            f"{_function(eqn)} is a custom_vjp function of parameters alone ({path}), so "
            "that its backward rule sees the gradient summed over rows, and must be linear for "
            f"rows to have parts in what it gives. Found {_found(error)}, which is not. Leave the "
            "function out of the loss and apply its rule to the gradient afterwards, or apply it "
            "where rows are apart."
        ) from None


def _in_rule(eqn, which: str, error: RowAxisError) -> RowAxisError:
    return RowAxisError(f"in the {which} rule of {_function(eqn)}: {error}")


def _check_backward(eqn, infos, actives, rows, num_rows) -> None:
    """Cotangents of operands have their rows where the operands have them."""
    active = _active(eqn, actives)
    wanted = [is_active and isinstance(info, Rows) for is_active, info in zip(active, infos)]
    places = [info for info, var in zip(rows, eqn.outvars) if is_real_or_complex(var)]
    if num_rows == 1 or not any(wanted) or not any(isinstance(info, Rows) for info in places):
        return
    expected = [info for info, is_wanted in zip(infos, wanted) if is_wanted]
    moving = [isinstance(info, Rows) for info in places]
    program = pullback(eqn, active, wanted)
    _check_rule(eqn, "backward", program, [*infos, *places], active, moving, expected, num_rows)


def _check_forward(eqn, infos, actives, rows, num_rows) -> None:
    """Tangents of outputs have their rows where the outputs have them."""
    active = _active(eqn, actives)
    wanted = [
        isinstance(info, Rows) and is_real_or_complex(var) for info, var in zip(rows, eqn.outvars)
    ]
    if num_rows == 1 or not any(wanted) or not any(active):
        return
    places = [info for info, is_active in zip(infos, active) if is_active]
    expected = [info for info, is_wanted in zip(rows, wanted) if is_wanted]
    moving = [not isinstance(info, Mixed) for info in places]
    program = pushforward(eqn, active, wanted)
    _check_rule(eqn, "derivative", program, [*infos, *places], active, moving, expected, num_rows)


def _check_rule(eqn, which, program, infos, active, moving, expected, num_rows) -> None:
    """What has no rows of its own, such as the cotangent of a mean, mixes none."""
    count = len(active)
    infos = [*infos[:count], *(info if isinstance(info, Rows) else None for info in infos[count:])]
    given = {number for number, moves in zip(program.inputs[count:], moving) if moves}
    places = _places(program, infos, active, given)
    try:
        for _ in follow(program.steps, places, num_rows):
            pass
    except RowAxisError as error:
        raise _in_rule(eqn, which, error) from None
    for atom, wanted in zip(program.outputs, expected, strict=True):
        found = places.infos.get(atom) if _is_number(atom) and atom in places.moving else None
        if found is not None and found != wanted:
            reason = (
                f"rows mixed ({found.reason})" if isinstance(found, Mixed) else f"them at {found}"
            )
            kind = "cotangent of an operand" if which == "backward" else "tangent of an output"
            raise _in_rule(
                eqn,
                which,
                RowAxisError(
                    f"the {kind} must have rows where that has them, at {wanted}. Found "
                    f"{reason}. {WAY_OUT}"
                ),
            )


def _custom_vjp(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    if not any(value.is_data for value in operands):
        return walk.parameters_only(eqn, operands, functools.partial(ParameterRule, eqn))
    rows = walk.rows_after(eqn, operands)
    tangents = {
        path: RuleTangents(eqn, operands, rows, path, walk.num_rows) for path in paths_of(operands)
    }
    outputs = bind(eqn, [value.primal for value in operands])
    return walk.channels(eqn, outputs, tangents, rows)


HANDLERS.update({"custom_vjp_call": _custom_vjp})
CHECKS.update({"custom_vjp_call": _check_backward, "custom_jvp_call": _check_forward})
