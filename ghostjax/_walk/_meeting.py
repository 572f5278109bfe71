"""Where parameters meet data: the channel, and the tangents that its backward pass needs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._channel import channel
from ghostjax._jaxprs import live_equations
from ghostjax._walk._lookups import as_gradients_see
from ghostjax._walk._rows import Rows, split_rows
from ghostjax._walk._values import Value


def push_forward(
    function: Callable[..., list], values: Sequence[Value], path: str
) -> tuple[list[Any], list[Any]]:
    """Outputs and tangents of ``function`` when parameter ``path`` moves along the direction."""
    primals = [value.primal for value in values]
    moving = [position for position, value in enumerate(values) if path in value.tangents]

    def of_moving(*arrays):
        operands = list(primals)
        for position, array in zip(moving, arrays):
            operands[position] = array
        return function(operands)

    return jax.jvp(
        of_moving,
        [primals[position] for position in moving],
        [values[position].tangents[path] for position in moving],
    )


class Tangents:
    """The tangents of one operation's outputs, as a function of no more operands than they need.

    What is not needed is not kept for the backward pass: the tangent of ``x + bias`` needs no x.
    """

    def __init__(self, function: Callable[..., list], values: Sequence[Value], path: str):
        moving = [value.tangents[path] for value in values if path in value.tangents]

        def tangents(primals, moving):
            moving = iter(moving)
            moved = [
                Value(primal, {path: next(moving)} if path in value.tangents else {})
                for primal, value in zip(primals, values)
            ]
            outputs = push_forward(function, moved, path)[1]
            return [_dense(leaf) for leaf in outputs]

        operands = [value.primal for value in values]
        closed = jax.make_jaxpr(tangents)(operands, moving)
        moves = [False] * len(operands) + [True] * len(moving)
        self._jaxpr = as_gradients_see(closed.jaxpr, moves)
        _, live = live_equations(self._jaxpr, [True] * len(self._jaxpr.outvars))
        inputs = self._jaxpr.invars
        self._kept = [position for position, var in enumerate(inputs) if var in live]
        self._avals = [var.aval for var in inputs]
        self.needs_data = any(
            values[position].is_data for position in self._kept if position < len(values)
        )
        arrays = [*operands, *moving]
        self.operands = [arrays[position] for position in self._kept] + list(closed.consts)

    def __call__(self, operands: Sequence[Any]) -> list[Any]:
        kept, consts = operands[: len(self._kept)], operands[len(self._kept) :]
        arrays = [jnp.zeros(aval.shape, aval.dtype) for aval in self._avals]
        for position, array in zip(self._kept, kept):
            arrays[position] = array
        closed = core.ClosedJaxpr(self._jaxpr, list(consts))
        return core.jaxpr_as_fun(closed)(*arrays)

    def sums(self, operands, cotangents, where, num_rows) -> jax.Array:
        """The inner products of cotangents and tangents, by row where ``where`` has rows."""
        moved = self(operands)
        return sum(
            row_sums(cotangent, moved[position], where[position], num_rows)
            for position, cotangent in enumerate(cotangents)
            if cotangent is not None
        )


def is_inexact(output: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(output), jnp.inexact)


def _dense(tangent: Any) -> Any:
    """Integer outputs have tangents without a value."""
    return jnp.zeros(tangent.shape) if tangent.dtype == jax.dtypes.float0 else tangent


def _paired(cotangents: Any, tangents: Any) -> jax.Array:
    """The products that add up to <cotangents, tangents>, in float32 or wider.

    Of complex values the real part, without a conjugate: that is what JAX's cotangents mean.
    """
    if jnp.iscomplexobj(cotangents) or jnp.iscomplexobj(tangents):
        parts = [(jnp.real(array), jnp.imag(array)) for array in (cotangents, tangents)]
        return _paired(parts[0][0], parts[1][0]) - _paired(parts[0][1], parts[1][1])
    wide = jnp.float64 if cotangents.dtype == jnp.float64 else jnp.float32
    return cotangents.astype(wide) * tangents.astype(wide)


def row_sums(cotangents: Any, tangents: Any, rows: Rows | None, num_rows: int) -> jax.Array:
    """sum of cotangents * tangents over everything but the rows, in float32 or wider: [B].

    A scalar where ``rows`` is None: the sum over everything.
    """
    product = _paired(cotangents, tangents)
    if rows is None:
        return jnp.sum(product)
    return jnp.sum(split_rows(product, rows, num_rows), axis=1)


@jax.custom_vjp
def one_per_row(outputs: Sequence[Any], tap: Any) -> list[Any]:
    """``outputs`` as they are, but vectorized wherever ``tap`` is.

    The cotangents of what vectorization need not repeat come summed over the rows, too late for a
    channel that is to tell them apart.
    """
    return [jax.lax.select_n(tap == 0, output, output) for output in outputs]


one_per_row.defvjp(
    lambda outputs, tap: (one_per_row(outputs, tap), None),
    lambda _, cotangents: (cotangents, None),
)


def _sharded_as(array: jax.Array, sharding: Any) -> jax.Array:
    """On a mesh of explicit axes, shardings are part of a type."""
    if jax.typeof(array).sharding.spec == sharding.spec:
        return array
    return jax.sharding.reshard(array, sharding)


def attach_channel(
    outputs: Sequence[Any],
    tangents: dict[str, Tangents],
    where: list[Rows | None],
    taps: dict[str, Any],
    num_rows: int,
) -> list[Any]:
    """Puts a channel behind ``outputs`` that gives each path's tap its inner products.

    ``where`` says, per output, which axis holds the rows.
    """
    differentiable = [position for position, output in enumerate(outputs) if is_inexact(output)]

    def backward(residuals, cotangents):
        given = dict(zip(differentiable, cotangents))
        full = [given.get(position) for position in range(len(outputs))]
        return {
            path: _sharded_as(tangents[path].sums(operands, full, where, num_rows), shardings[path])
            for path, operands in residuals.items()
        }

    carried = {path: taps[path] for path in tangents}
    shardings = {path: jax.typeof(tap).sharding for path, tap in carried.items()}
    residuals = jax.lax.stop_gradient({path: found.operands for path, found in tangents.items()})
    passed = channel(
        backward, [outputs[position] for position in differentiable], carried, residuals
    )
    outputs = list(outputs)
    for position, output in zip(differentiable, passed):
        outputs[position] = output
    return outputs
