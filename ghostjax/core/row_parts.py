"""Some of a meeting's rows: what they give the operands that are made of parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import live_equations
from ghostjax.core.convolutions import as_product
from ghostjax.core.meeting import Cells, Meeting, is_inexact, weighted, weights_at
from ghostjax.core.places import Rows
from ghostjax.core.routes import make_meeting
from ghostjax.core.values import Value

# Their parameters hold no shapes, so that they can be applied to some of the rows.
_ELEMENTWISE = frozenset(["add", "atan2", "div", "max", "min", "mul", "pow", "select_n", "sub"])
_OTHERS = frozenset(("conv_general_dilated", "dot_general", "gather"))


class Pullback:
    """The cotangents of an operation's moving operands, from those of its outputs.

    ``kept`` are the positions of the operands whose values it needs.
    """

    def __init__(self, function, operands: Sequence[Any], moving: Sequence[int], meeting: Meeting):
        def pulled(primals, cotangents):
            def of_moving(*arrays):
                full = list(primals)
                for position, array in zip(moving, arrays):
                    full[position] = array
                outputs = function(full)
                return [outputs[k] for k in meeting.differentiable]

            return jax.vjp(of_moving, *(primals[k] for k in moving))[1](cotangents)

        outputs = [meeting.outputs[k] for k in meeting.differentiable]
        closed = jax.make_jaxpr(pulled)(list(operands), outputs)
        _, live = live_equations(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        inputs = closed.jaxpr.invars[: len(operands)]
        self._jaxpr = closed.jaxpr
        self._avals = [var.aval for var in inputs]
        self.consts = closed.consts
        self.moving = list(moving)
        self.kept = [position for position, var in enumerate(inputs) if var in live]

    def take_consts(self) -> list[Any]:
        """Arrays of the trace in which this was made, which must not leave it otherwise."""
        consts, self.consts = self.consts, None
        return consts

    def __call__(self, operands: dict[int, Any], consts, cotangents) -> dict[int, Any]:
        primals = [
            operands[position] if position in self.kept else jnp.zeros(aval.shape, aval.dtype)
            for position, aval in enumerate(self._avals)
        ]
        closed = core.ClosedJaxpr(self._jaxpr, list(consts))
        return dict(zip(self.moving, core.jaxpr_as_fun(closed)(*primals, *cotangents)))


class Part:
    """``count`` of a meeting's rows, from one that may be traced; or all of them.

    Attributes:
      whole: the meeting of all rows.
      meeting: that of these rows; the whole one where it cannot be cut.
      kept: positions of the operands whose values are needed.
      is_cut: whether it is of these rows alone.
    """

    def __init__(
        self,
        whole: Meeting,
        function: Callable[[Sequence[Any]], list],
        operands: Sequence[Value],
        outputs: Sequence[Any],
        count: int | None,
    ):
        self.whole, self.count = whole, count
        # Beside cells along several axes, operands say where rows are, which are fewer.
        of_cells = any(isinstance(info, Cells) and info.axes for info in whole.rows)
        self.operand_rows = [None if of_cells else value.rows for value in operands]
        self.inexact_data = {
            k for k, value in enumerate(operands) if value.is_data and is_inexact(value.primal)
        }
        self.is_cut = count != whole.num_rows and _can_be_cut(whole, operands)
        self.meeting = whole
        if self.is_cut:
            operands = [
                Value(
                    self._shape(value.primal, value.rows),
                    value.tangents,
                    value.is_data,
                    value.active,
                    value.where,
                )
                for value in operands
            ]
            outputs = [self._shape(*pair) for pair in zip(outputs, whole.rows)]
            self.meeting = make_meeting(
                whole.eqn, function, operands, outputs, whole.rows, count, whole.names
            )
            self.meeting.in_rows = whole.in_rows
        self.pullback = None
        if not hasattr(whole, "gradient_of_rows"):
            moving = sorted({k for own in whole.moving.values() for k in own})
            primals = [value.primal for value in operands]
            if count == 1 and (self.is_cut or whole.num_rows is None):
                function = as_product(whole, function)
            self.pullback = Pullback(function, primals, moving, self.meeting)
        pulled = self.pullback.kept if self.pullback else ()
        self.kept = sorted({*self.meeting.kept, *pulled})

    def take_consts(self) -> Any:
        """Those of the pullback; a meeting that was cut has its own."""
        own = self.meeting.take_consts() if self.is_cut else None
        return own, self.pullback and self.pullback.take_consts()

    def gradient(
        self, arrays: dict[int, Any], consts: Any, cotangents: Sequence[Any], start: Any
    ) -> dict[int, Any]:
        """By position, the cotangents of the moving operands, of these rows alone.

        ``consts`` are those of the whole meeting, and what ``take_consts`` gave.
        """
        if not self.is_cut:
            return self.weighted_gradient(arrays, consts, cotangents, self.weights(start))
        arrays, cotangents = self.own(arrays, cotangents, start)
        return self.pullback(arrays, consts[1][1], cotangents)

    def own(self, arrays: dict[int, Any], cotangents: Sequence[Any], start: Any):
        """The operands and cotangents of these rows; of a whole meeting, those of others zeros."""
        if not self.is_cut:
            return arrays, self._weighted(cotangents, self.weights(start))
        cut = {k: self._cut(array, self.operand_rows[k], start) for k, array in arrays.items()}
        return cut, [self._cut(*pair, start) for pair in zip(cotangents, self.places())]

    def weighted_gradient(
        self, arrays: dict[int, Any], consts: Any, cotangents: Sequence[Any], weights: Any
    ) -> dict[int, Any]:
        """The same of all rows times their weights [B]; of a part that is not cut."""
        of_whole, (_, pulled) = consts
        if self.pullback is None:
            kept = [arrays[position] for position in self.whole.kept], of_whole
            return self.whole.gradient_of_rows(kept, cotangents, weights)
        return self.pullback(arrays, pulled, self._weighted(cotangents, weights))

    def without(self, arrays: dict[int, Any], weights: Any) -> dict[int, Any]:
        """The operands with ones for what there is in rows of weight 0, which may be no number."""
        count, found = self.whole.num_rows, dict(arrays)
        if self.whole.mixes_rows:
            return found
        for position in self.inexact_data & arrays.keys():
            info = self.operand_rows[position]
            if count is None or isinstance(info, Rows):
                array, place = arrays[position], info if count is not None else None
                is_own = weights_at(array, place, count, weights).astype(bool)
                found[position] = jnp.where(is_own, array, jnp.ones_like(array))
        return found

    def places(self) -> list[Any]:
        """Of the cotangents."""
        return [self.whole.rows[position] for position in self.whole.differentiable]

    def weights(self, start: Any) -> jax.Array:
        if self.whole.num_rows is None:
            return jnp.ones((), bool)
        rows = jnp.arange(self.whole.num_rows)
        return (rows >= start) & (rows < start + self.count)

    def _weighted(self, cotangents, weights):
        return [
            weighted(*pair, self.whole.num_rows, weights) for pair in zip(cotangents, self.places())
        ]

    def _shape(self, array: Any, info: Any) -> Any:
        shape, dtype = list(jnp.shape(array)), jnp.result_type(array)
        if isinstance(info, Rows):
            shape[info.axis] = shape[info.axis] // self.whole.num_rows * self.count
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    def _cut(self, array: jax.Array, info: Any, start: Any) -> jax.Array:
        if not isinstance(info, Rows):
            return array
        if isinstance(start, int):
            end = (start + self.count) * info.inner
            return jax.lax.slice_in_dim(array, start * info.inner, end, axis=info.axis)
        size = self.count * info.inner
        return jax.lax.dynamic_slice_in_dim(array, start * info.inner, size, info.axis)


def _can_be_cut(whole: Meeting, operands: Sequence[Value]) -> bool:
    if whole.eqn is None or whole.num_rows is None or has_split_rows(operands):
        return False
    data = [(value.primal, value.rows) for value in operands if value.is_data]
    places = [*whole.rows, *(info for _, info in data)]
    if not all(isinstance(info, Rows) and info.outer == 1 for info in places):
        return False
    # What is the same for all rows may have been repeated for each of them.
    shapes = [jnp.shape(value.primal) for value in operands if not value.is_data]
    axis, name = whole.rows[0].axis, whole.eqn.primitive.name
    if name in _OTHERS:
        return not _parameter_has_rows(whole, operands)
    return name in _ELEMENTWISE and all(not shape or shape[axis] == 1 for shape in shapes)


def has_split_rows(operands: Sequence[Value]) -> bool:
    """Whether the types say that rows are on several devices, so that one cannot be cut out."""
    return any(
        isinstance(value.rows, Rows)
        and jax.typeof(value.primal).sharding.spec[value.rows.axis] is not None
        for value in operands
    )


def _parameter_has_rows(whole: Meeting, operands: Sequence[Value]) -> bool:
    """Whether a parameter's axis is paired with that of the rows, one entry for each."""
    dims = whole.eqn.params["dimension_numbers"]
    if whole.eqn.primitive.name == "dot_general":
        (_, (batch, _)) = dims
        return whole.rows[0].axis < len(batch)
    if whole.eqn.primitive.name == "gather":
        return operands[1].rows.axis in dims.start_indices_batching_dims
    return False
