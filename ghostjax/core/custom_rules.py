"""Functions with derivative rules of their own: the dots of their parameters, and their rows.

The backward rule of a ``custom_vjp`` function need not be linear in the cotangent: it may clip it,
round it or take its sign. But up to where it sums over rows for a parameter it keeps them in
place, and from there on it is linear. With u the values that are summed, c the cotangents and A the
linear rest, the gradient is A u(c), and < A u(c), direction > = < u(c), A^T direction >, whose
left factor has rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import bind, describe_operation, holds, inner_jaxprs, is_inexact
from ghostjax.core.devices import as_many, crosses, is_one_row
from ghostjax.core.inside import reached
from ghostjax.core.linear import Kind, NotLinearError
from ghostjax.core.lookups import as_run
from ghostjax.core.meeting import Cells, Meeting, Route, row_sums, weighted, wide_dtype
from ghostjax.core.mixing import CHECKS, WAY_OUT, several_axes_message
from ghostjax.core.places import Mixed, RowInfo, Rows
from ghostjax.core.program import Program, is_literal, run
from ghostjax.core.push import PUSHES
from ghostjax.core.routes import KINDS
from ghostjax.core.rule_cells import split_along
from ghostjax.core.rule_rows import Places, follow, kinds_of, split_at_sums
from ghostjax.core.rules import pullback, pushforward


class RuleMeeting(Meeting):
    """What a backward rule gives its parameters, dotted with directions row by row.

    Where there are rows but no output has them, the function itself sums over them: rows are those
    of its operands.
    """

    def _prepare(self, function, operands):
        del function
        eqn = self.eqn
        active = _active(eqn, [value.active or bool(value.tangents) for value in operands])
        self._moving = [k for k, value in enumerate(operands) if value.tangents]
        program = pullback(eqn, active, [bool(value.tangents) for value in operands])
        if self.num_rows is None:
            _check_shared_outputs(eqn, program, [value.is_data for value in operands])
        self.kept = [k for k in range(len(operands)) if program.inputs[k] in program.used]
        self._consts = program.consts
        self._program = dataclasses.replace(program, consts=dict.fromkeys(program.consts))
        self._cotangents = program.inputs[len(operands) :]
        self.needs_data = True
        self._dtypes = [jnp.result_type(operands[k].primal) for k in self._moving]
        inexact = [info for info, var in zip(self.rows, eqn.outvars) if is_inexact(var)]
        self._split = None
        paths = ", ".join(self.names[path] for path in self.moving)
        cells = next((info for info in inexact if isinstance(info, Cells)), None)
        if cells is not None and cells.axes:

            def split(infos, count):
                places = _places(program, infos, active, set(self._cotangents))
                return _split(eqn, program, places, paths, as_many(count, self.num_rows))

            self._split = split_along(eqn, operands, cells, split)
            if self._split is None:
                raise RowAxisError(several_axes_message(describe_operation(eqn), paths))
        single = self.num_rows is None or is_one_row(self.num_rows)
        if not single and all(info is None or isinstance(info, Rows) for info in inexact):
            infos = [*(value.rows for value in operands), *inexact]
            places = _places(program, infos, active, set(self._cotangents))
            self._split = _split(eqn, program, places, paths, self.num_rows)
        if self._split is None:
            _check_alone(eqn, program, paths, self.num_rows)

    @property
    def mixes_rows(self) -> bool:
        return self._split is not None and self._split.mixes

    @property
    def adds_up_over_devices(self) -> bool:
        """Whether the rule has sums over devices, typed as the ``shard_map`` around has it."""
        return any(holds(step.eqn, "psum_invariant") for step in self._program.steps)

    def take_consts(self):
        consts = list(self._consts.values())
        del self._consts
        return consts

    def _given(self, kept, cotangents) -> dict[int, Any]:
        arrays, consts = kept
        numbers = [*(self._program.inputs[k] for k in self.kept), *self._program.consts]
        return dict(
            zip([*numbers, *self._cotangents], [*arrays, *consts, *cotangents], strict=True)
        )

    def _gradients(self, env) -> list[Any]:
        read = run(self._program.steps, env)
        return [read(atom) for atom in self._program.outputs]

    def _summed(self, env):
        """What the rule sums over rows, and the rest of it as a function of that."""
        split = self._split
        run(split.before, env)

        def rest(*summed):
            read = run(split.after, env | dict(zip(split.summed, summed)), _evaluated)
            return [read(self._program.outputs[position]) for position in split.outputs]

        return [env[number] for number in split.summed], rest

    def route(self, directions, *, late):
        del directions, late
        return Route.RULE

    def sums(self, kept, vectors, cotangents, stacked, route):
        del route
        env = self._given(kept, cotangents)
        one = self._without_rows(env) if self._split is None else self._by_row(env)
        return {
            path: jax.vmap(functools.partial(one, path))(own) if stacked else one(path, own)
            for path, own in vectors.items()
        }

    def _without_rows(self, env):
        """There is but one row."""
        gradients = dict(zip(self._moving, self._gradients(env)))

        def one(path, vectors):
            pairs = [(gradients[k], v) for k, v in zip(self.moving[path], vectors)]
            return sum(
                row_sums(
                    jnp.ravel(gradient),
                    jnp.ravel(vector),
                    self.num_rows and Rows(0, 1, gradient.size),
                    self.num_rows,
                )
                for gradient, vector in pairs
            )

        return one

    def _by_row(self, env):
        summed, rest = self._summed(env)
        _, transposed = jax.vjp(rest, *summed)

        def one(path, vectors):
            along = dict(zip(self.moving[path], vectors))
            found = transposed(
                [
                    along.get(position, jnp.zeros(shape.shape, shape.dtype))
                    for position, shape in outputs
                ]
            )
            parts = zip(summed, found, self._split.summed.values())
            none = jnp.zeros(self.num_rows, wide_dtype(*vectors))
            return sum((row_sums(*part, self.num_rows) for part in parts), none)

        moving = [self._moving[position] for position in self._split.outputs]
        outputs = list(zip(moving, jax.eval_shape(rest, *summed)))
        return one

    def gradient_of_rows(self, kept, cotangents, weights) -> dict[int, Any]:
        """By position, the gradient of the moving operands by rows times their weights [B]."""
        env = self._given(kept, cotangents)
        if self._split is None:
            gradients = dict(zip(self._moving, self._gradients(env)))
            return {k: weighted(own, None, None, weights) for k, own in gradients.items()}
        summed, rest = self._summed(env)
        places = self._split.summed.values()
        own = [weighted(u, info, self.num_rows, weights) for u, info in zip(summed, places)]
        found = dict(zip(self._split.outputs, rest(*own)))
        return {
            k: found[number] if number in found else jnp.zeros(self._shape(number), dtype)
            for number, (k, dtype) in enumerate(zip(self._moving, self._dtypes))
        }

    def _shape(self, number):
        return self.eqn.invars[self._moving[number]].aval.shape


def push_through_rule(eqn: Any, primals, moving, name: str):
    """The tangents of a ``custom_vjp`` function of parameters alone, whose rule must be linear."""
    # By what its function closes over, JAX does not differentiate.
    closed_over = eqn.params.get("num_consts", 0)
    every = [k >= closed_over and is_inexact(atom) for k, atom in enumerate(eqn.invars)]
    program = pullback(eqn, every, [k in moving for k in range(len(primals))])
    numbers = program.inputs[len(primals) :]
    _check_linear(eqn, program, numbers, name)
    env = dict(zip(program.inputs, primals)) | program.consts

    def push(direction):
        def rule(cotangents):
            read = run(program.steps, env | dict(zip(numbers, cotangents)), _evaluated)
            outputs = map(read, program.outputs)
            return [jnp.asarray(output, v.dtype) for output, v in zip(outputs, direction)]

        inexact = [var.aval for var in eqn.outvars if is_inexact(var)]
        _, transposed = jax.vjp(rule, [jnp.zeros(aval.shape, aval.dtype) for aval in inexact])
        tangents = iter(transposed(direction)[0])
        return [next(tangents) if is_inexact(var) else None for var in eqn.outvars]

    return push


def _check_shared_outputs(eqn: Any, program: Program, are_data: Sequence[bool]) -> None:
    """Of an output that vectorization does not repeat, JAX counts the cotangent once for every row
    where the rule brings it together with rows: ``jax.grad`` of such a function is wrong in JAX
    0.10, and an error later."""
    ((jaxpr, _),) = inner_jaxprs(eqn)
    found = reached(jaxpr, are_data, by_gradient=False)
    has_rows = [found[k] for k, var in enumerate(eqn.outvars) if is_inexact(var)]
    operands, cotangents = program.inputs[: len(are_data)], program.inputs[len(are_data) :]
    shared = {number for number, own in zip(cotangents, has_rows) if not own}
    of_rows = {number for number, own in zip(cotangents, has_rows) if own}
    of_rows.update(number for number, is_data in zip(operands, are_data) if is_data)
    for step in program.steps:
        for group in (shared, of_rows):
            if any(not is_literal(atom) and atom in group for atom in step.inputs):
                group.update(step.outputs)
    if any(not is_literal(atom) and atom in shared & of_rows for atom in program.outputs):
        raise NotImplementedError(
            f"{_function(eqn)} has an output that does not depend on the row, whose cotangent its "
            "backward rule brings together with rows. JAX does not differentiate that right under "
            "jax.vmap. With per_example=True, compute that output outside of the function."
        )


def _check_alone(eqn: Any, program: Program, paths: str, num_rows: int | None) -> None:
    """Where a device has one row, a sum over devices is one over rows, which cannot be split."""
    for step in program.steps:
        if crosses(step.eqn, num_rows):
            raise RowAxisError(
                f"{_function(eqn)}: in what its backward rule gives parameter {paths}, "
                f"{step.eqn.primitive.name} goes over the devices that rows are on, which have "
                "one row each. Leave that to jax.shard_map, which adds up the gradient of what all "
                "devices have alike (with check_vma=True make the parameter varying before the "
                "function, by jax.lax.pcast)."
            )


def _function(eqn: Any) -> str:
    """The call and the function; of the operations in a backward rule JAX keeps no source line."""
    ((jaxpr, _),) = inner_jaxprs(eqn)
    info = getattr(jaxpr, "debug_info", None)
    source = getattr(info, "func_src_info", None) or ""
    return f"{describe_operation(eqn)} ({source})" if " at " in source else describe_operation(eqn)


def _evaluated(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """What is to be transposed: JAX lets nothing through ``stop_gradient``."""
    return list(operands) if eqn.primitive.name == "stop_gradient" else bind(as_run(eqn), operands)


def _active(eqn: Any, actives: Sequence[bool]) -> list[bool]:
    return [active and is_inexact(atom) for atom, active in zip(eqn.invars, actives)]


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
        raise not_a_sum(eqn, path, error) from None
    except RowAxisError as error:
        raise in_rule(eqn, "backward", error) from None


def not_a_sum(eqn: Any, path: str, error: NotLinearError) -> RowAxisError:
    return RowAxisError(
        f"{_function(eqn)}: what its backward rule gives parameter {path} must be a sum over "
        f"rows, or linear in such sums. Found {_found(error)}, which is not, so that no row "
        "has a part of its own. Write the loss for one row and pass per_example=True, which "
        "takes any rule, or change the rule."
    )


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


def in_rule(eqn, which: str, error: RowAxisError) -> RowAxisError:
    return RowAxisError(f"in the {which} rule of {_function(eqn)}: {error}")


def _check_backward(eqn, infos, actives, rows, num_rows) -> None:
    """Cotangents of operands have their rows where the operands have them."""
    active = _active(eqn, actives)
    wanted = [is_active and isinstance(info, Rows) for is_active, info in zip(active, infos)]
    places = [info for info, var in zip(rows, eqn.outvars) if is_inexact(var)]
    moving = [isinstance(info, Rows) for info in places]
    if is_one_row(num_rows) or not any(wanted) or not any(moving):
        return
    expected = [*compress(infos, wanted)]
    program = pullback(eqn, active, wanted)
    _check_rule(eqn, "backward", program, [*infos, *places], active, moving, expected, num_rows)


def _check_forward(eqn, infos, actives, rows, num_rows) -> None:
    """Tangents of outputs have their rows where the outputs have them."""
    active = _active(eqn, actives)
    wanted = [isinstance(info, Rows) and is_inexact(var) for info, var in zip(rows, eqn.outvars)]
    if is_one_row(num_rows) or not any(wanted) or not any(active):
        return
    places = [*compress(infos, active)]
    expected = [*compress(rows, wanted)]
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
        raise in_rule(eqn, which, error) from None
    for atom, wanted in zip(program.outputs, expected, strict=True):
        found = places.infos.get(atom) if not is_literal(atom) and atom in places.moving else None
        if found is not None and found != wanted:
            reason = (
                f"rows mixed ({found.reason})" if isinstance(found, Mixed) else f"them at {found}"
            )
            kind = "cotangent of an operand" if which == "backward" else "tangent of an output"
            raise in_rule(
                eqn,
                which,
                RowAxisError(
                    f"the {kind} must have rows where that has them, at {wanted}. Found "
                    f"{reason}. {WAY_OUT}"
                ),
            )


KINDS["custom_vjp_call"] = RuleMeeting
PUSHES["custom_vjp_call"] = push_through_rule
CHECKS.update({"custom_vjp_call": _check_backward, "custom_jvp_call": _check_forward})
