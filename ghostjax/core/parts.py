"""A meeting of concatenated rows, training rows first: its parts, and what each gives.

The training part gives the gradient, the validation part the direction, and both the dots of the
training rows with it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import live_equations
from ghostjax.core.meeting import Meeting, masked, wide_dtype
from ghostjax.core.places import Rows
from ghostjax.core.routes import Product, Repeated, make_meeting
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


@dataclasses.dataclass
class _Part:
    """Rows ``start`` to ``stop`` of a meeting.

    ``where`` says, per operand and per output, where rows are to be cut; None if they are not: then
    the meeting is the whole one, and cotangents of other rows are zeros.
    """

    start: int
    stop: int
    meeting: Meeting
    pullback: Pullback | None

    @property
    def is_cut(self) -> bool:
        return self.meeting.num_rows == self.stop - self.start


class Parts:
    """What is static about a meeting of concatenated rows; arrays are handed in.

    Attributes:
      eqn, moving, in_rows, outputs, differentiable, needs_data: those of the whole meeting.
    """

    def __init__(
        self, eqn, function, operands, outputs, rows, num_rows: int, names, num_train: int
    ):
        self.names = names
        self.whole = make_meeting(eqn, function, operands, outputs, rows, num_rows, names)
        self._by_rule = getattr(self.whole, "gradient_of_rows", None)
        self.moving, self.outputs = self.whole.moving, self.whole.outputs
        self.differentiable, self.needs_data = self.whole.differentiable, self.whole.needs_data
        self.eqn, self.in_rows = eqn, self.whole.in_rows
        self.operand_rows = [value.rows for value in operands]
        self.rows, self.num_rows, self.num_train = list(rows), num_rows, num_train
        self.train, self.val = (
            self._part(function, operands, outputs, *ends)
            for ends in ((0, num_train), (num_train, num_rows))
        )
        needed = [
            position
            for part in (self.train, self.val)
            for position in (*part.meeting.kept, *(part.pullback.kept if part.pullback else ()))
        ]
        self._kept = sorted({*needed, *self.whole.kept})

    def _part(self, function, operands, outputs, start, stop) -> _Part:
        if self.eqn is None or not self._can_be_cut(operands):
            meeting = self.whole
        else:
            operands = [
                Value(
                    _cut_shape(value.primal, value.rows, self.num_rows, stop - start),
                    value.tangents,
                    value.is_data,
                    value.active,
                    value.rows,
                )
                for value in operands
            ]
            outputs = [
                _cut_shape(output, info, self.num_rows, stop - start)
                for output, info in zip(outputs, self.rows)
            ]
            meeting = make_meeting(
                self.eqn, function, operands, outputs, self.rows, stop - start, self.names
            )
            meeting.in_rows = self.in_rows
        moving = sorted({k for own in self.moving.values() for k in own})
        primals = [value.primal for value in operands]
        pullback = None
        if self._by_rule is None:
            pullback = Pullback(function, primals, moving, meeting)
        return _Part(start, stop, meeting, pullback)

    def _can_be_cut(self, operands) -> bool:
        places = [*self.rows, *(value.rows for value in operands if value.is_data)]
        if not all(isinstance(info, Rows) and info.outer == 1 for info in places):
            return False
        if self.eqn.primitive.name in _OTHERS:
            return not self._parameter_has_rows()
        # What is the same for all rows may have been repeated for each of them.
        shapes = [jnp.shape(value.primal) for value in operands if not value.is_data]
        axis = self.rows[0].axis
        return self.eqn.primitive.name in _ELEMENTWISE and all(
            not shape or shape[axis] == 1 for shape in shapes
        )

    def _parameter_has_rows(self) -> bool:
        """Whether a parameter's axis is paired with that of the rows, one entry for each."""
        dims = self.eqn.params["dimension_numbers"]
        if self.eqn.primitive.name == "dot_general":
            (_, (batch, _)) = dims
            return self.rows[0].axis < len(batch)
        if self.eqn.primitive.name == "gather":
            return self.operand_rows[1].axis in dims.start_indices_batching_dims
        return False

    def keep(self, operands: Sequence[Value], outputs: Any) -> Any:
        """The arrays that all else needs. Called once, where the meeting was made."""
        del outputs
        parts = {id(part.meeting): part.meeting for part in (self.train, self.val)}
        consts = [meeting.take_consts() for meeting in parts.values()]
        pulled = [part.pullback and part.pullback.take_consts() for part in (self.train, self.val)]
        arrays = {position: operands[position].primal for position in self._kept}
        return arrays, consts, pulled

    def _of(self, part: _Part, kept, cotangents):
        """``(operands, consts of the meeting, those of the pullback, cotangents)`` of a part."""
        arrays, consts, pulled = kept
        number = 0 if part is self.train else 1
        cotangents = list(cotangents)
        for k, position in enumerate(self.differentiable):
            info = self.rows[position]
            ends = part.start, part.stop
            if part.is_cut:
                cotangents[k] = _cut(cotangents[k], info, self.num_rows, *ends)
            else:
                cotangents[k] = masked(cotangents[k], info, self.num_rows, *ends)
        if part.is_cut:
            arrays = {
                position: _cut(array, self.operand_rows[position], self.num_rows, *ends)
                if isinstance(self.operand_rows[position], Rows)
                else array
                for position, array in arrays.items()
            }
        return arrays, consts[min(number, len(consts) - 1)], pulled[number], cotangents

    def gradient(self, part: _Part, kept, cotangents) -> dict[int, Any]:
        """By position, the cotangents of the moving operands, of the part's rows alone."""
        if self._by_rule is not None:
            arrays, (consts,), _ = kept
            own = [arrays[position] for position in self.whole.kept], consts
            return self._by_rule(own, cotangents, part.start, part.stop)
        arrays, _, consts, cotangents = self._of(part, kept, cotangents)
        return part.pullback(arrays, consts, cotangents)

    def by_parameter(self, gradients: dict[int, Any]) -> dict[int, list[Any]]:
        """The same in the order of what ``Push`` emits."""
        return {path: [gradients[k] for k in own] for path, own in self.moving.items()}

    def dots(self, kept, cotangents, vectors: dict[int, list[Any]]) -> dict[int, Any]:
        """Of the training rows, with directions at the moving operands: by parameter, [B]."""
        part = self.train
        arrays, consts, _, cotangents = self._of(part, kept, cotangents)
        own = [arrays[position] for position in part.meeting.kept], consts
        route = part.meeting.route(None, late=True)
        sums = part.meeting.sums(own, vectors, cotangents, False, route)
        return {path: found[: part.stop] for path, found in sums.items()}

    def at_once(self, kept, cotangents) -> tuple[dict[int, Any], dict[int, Any]]:
        """Of parameters that nothing else uses: dots with the validation rows, and the gradient."""
        if isinstance(self.whole, Repeated) and self.whole.few:
            rows = self.whole.flat(self.whole.row_gradients(kept[0], *cotangents))
            train, val = rows[: self.num_train], jnp.sum(rows[self.num_train :], axis=0)
            ((path, (position,)),) = self.moving.items()
            gradient = self.whole.parameter_like(jnp.sum(train, axis=0))
            dots = jnp.einsum("bf,f->b", train, val, precision="highest")
            return {path: dots}, {position: gradient}
        gradients = self.gradient(self.train, kept, cotangents)
        if isinstance(self.whole, Product) and self.train.is_cut:
            train, val = (self._factors(part, kept, cotangents) for part in (self.train, self.val))
            if gram_costs_less(train[0].shape, val[1].shape):
                ((path, _),) = self.moving.items()
                return {path: gram_dots(*train, *val)}, gradients
        direction = self.by_parameter(self.gradient(self.val, kept, cotangents))
        return self.dots(kept, cotangents, direction), gradients

    def _factors(self, part, kept, cotangents):
        arrays, _, _, (cotangent,) = self._of(part, kept, cotangents)
        return part.meeting.factors(arrays[1 - part.meeting.parameter], cotangent)


def gram_costs_less(train: tuple[int, int, int], val: tuple[int, int, int]) -> bool:
    """Whether einsum("bti,bto,vsi,vso->b") is cheaper over pairs of positions than multiplied out.

    Gram products over all pairs of positions take b t v s (i + o) multiplications. Multiplied out,
    the validation total takes v s i o and its product with the training rows b t i o.
    """
    (b, t, i), (v, s, o) = train, val
    return b * t * v * s * (i + o) < (b * t + v * s) * i * o


def gram_dots(inputs, cotangents, val_inputs, val_cotangents) -> jax.Array:
    """einsum("bti,bto,vsi,vso->b") over pairs of positions, [B]; sums in float32 or wider."""
    wide = wide_dtype(inputs, cotangents)
    operands = (inputs, val_inputs), (cotangents, val_cotangents)
    grams = [
        jnp.einsum("btf,vsf->btvs", first.astype(wide), second.astype(wide))
        for first, second in operands
    ]
    return jnp.einsum("btvs,btvs->b", *grams)


def _cut_shape(array: Any, info: Any, num_rows: int, rows: int) -> Any:
    shape, dtype = list(jnp.shape(array)), jnp.result_type(array)
    if isinstance(info, Rows):
        shape[info.axis] = shape[info.axis] // num_rows * rows
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _cut(array: jax.Array, rows: Rows, num_rows: int, start: int, stop: int) -> jax.Array:
    one = array.shape[rows.axis] // num_rows
    return jax.lax.slice_in_dim(array, start * one, stop * one, axis=rows.axis)
