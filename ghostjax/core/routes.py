"""Routes: other ways to a meeting's dots, taken where static shapes say that they cost less.

tangent   t = x . G for every direction, then < c_i , t_i >: what every meeting can do
rows      a matrix product: the weight gradient of one row after another, each dotted with all K
          directions; the sum over rows is the gradient. K directions for little more than one.
features  an elementwise operation with a parameter that is repeated over rows: the parameter's
          gradient per row, [B, F], times the directions [K, F]
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax.core.by_devices import splits_rows
from ghostjax.core.meeting import Meeting, Route, wide_dtype
from ghostjax.core.places import Rows, rows_first
from ghostjax.core.row_loop import row_loop, row_squares

# How many multiply-adds take as long as reading or writing one float32 of what no cache holds.
OPERATIONS_PER_NUMBER = {"cpu": 20}
OPERATIONS_ELSEWHERE = 400
# The gradient of the rows route is equal to rounding only, so where it makes the gradient it has to
# win clearly.
MARGIN = 1.5
# Operations of which ``Repeated`` knows the gradient by every row.
_REPEATED = frozenset({"add", "mul", "sub"})


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A matrix product: B rows of T positions, i features in, o features out."""

    b: int
    t: int
    i: int
    o: int


def operations_per_number() -> int:
    return OPERATIONS_PER_NUMBER.get(jax.default_backend(), OPERATIONS_ELSEWHERE)


def rows_cost_less(sizes: Sizes, directions: int, *, gradient: bool) -> bool:
    """Whether to make the weight gradient row by row rather than push K directions forward.

    Tangents take K B T i o multiply-adds and read the directions once. Row by row, every row's part
    [i, o] is written and read, added to the sum (two passes) and dotted with K directions; where
    the gradient is not made on the way, that part is a product of its own, B T i o.
    """
    per_number = operations_per_number()
    matrix = sizes.i * sizes.o
    tangents = directions * (sizes.b * sizes.t * matrix + per_number * matrix)
    passes = (4 if gradient else 2) + directions
    rows = sizes.b * matrix * passes * per_number
    if gradient:
        return MARGIN * rows < tangents
    return rows + sizes.b * sizes.t * matrix < tangents


class Product(Meeting):
    """A ``dot_general`` of data with a matrix of parameters."""

    def _prepare(self, function, operands):
        super()._prepare(function, operands)
        (self.parameter,) = {k for moving in self.moving.values() for k in moving}
        contracting, _ = self.eqn.params["dimension_numbers"]
        data = 1 - self.parameter
        shapes = [jnp.shape(value.primal) for value in operands]
        pairs = sorted(zip(contracting[self.parameter], contracting[data]))
        self._contracted = [axis for axis, _ in pairs]  # of the parameter
        self._free = [k for k in range(len(shapes[self.parameter])) if k not in self._contracted]
        self._inputs = [axis for _, axis in pairs]  # of the data
        self._positions = [k for k in range(len(shapes[data])) if k not in self._inputs]
        self._shape = shapes[self.parameter]
        self._dtype = jnp.result_type(operands[self.parameter].primal)
        self._data_rows = operands[data].rows
        places = [shapes[data][axis] for axis in self._positions]
        self.sizes = Sizes(
            self.num_rows,
            math.prod(places) // self.num_rows,
            math.prod(shapes[data][axis] for axis in self._inputs),
            math.prod(self._shape[axis] for axis in self._free),
        )
        # [i, o] where the parameter has its inputs first, else [o, i]: so that nothing is copied.
        self._inputs_first = self._contracted[:1] == [0] or not self._free

    def route(self, directions, *, late):
        count = len(self.moving) * (directions or 1)
        if all(self.in_rows.values()) and rows_cost_less(self.sizes, count, gradient=not late):
            return Route.ROWS
        return Route.TANGENT

    def takes_gradient(self, route):
        return self.parameter if route is Route.ROWS else None

    def sums(self, kept, vectors, cotangents, stacked, route):
        if route is Route.ROWS:
            return self.sums_and_gradient(kept, vectors, cotangents, stacked)[0]
        return super().sums(kept, vectors, cotangents, stacked, route)

    def sums_and_gradient(self, kept, vectors, cotangents, stacked):
        """What ``sums`` gives, and the gradient of the operand ``takes_gradient`` names."""
        ((data,), _), (cotangent,) = kept, cotangents
        inputs, outputs = self.factors(data, cotangent)
        pair = (inputs, outputs) if self._inputs_first else (outputs, inputs)
        matrices = [
            self._matrix(vector if stacked else vector[None]) for (vector,) in vectors.values()
        ]
        precision = self.eqn.params["precision"]
        total, dots = row_loop(precision, *pair, jnp.concatenate(matrices))
        dots = jnp.split(dots, len(vectors))
        sums = {path: part if stacked else part[0] for path, part in zip(vectors, dots)}
        return sums, self._parameter_like(total)

    def squares(self, data, cotangent):
        """The squared norm of the parameter's gradient by every row, [B], row by row."""
        return row_squares(self.eqn.params["precision"], *self.factors(data, cotangent))

    @property
    def contracted(self) -> list[int]:
        """Axes of the parameter."""
        return self._contracted

    def factors(self, data, cotangent):
        """The data operand [B, T, i] and the cotangents [B, T, o]."""
        inputs = rows_first(data, self._data_rows, self.num_rows, self._positions, self._inputs)
        offset = 0 if self.parameter == 1 else len(self._free)
        positions = [offset + k for k in range(len(self._positions))]
        features = [k for k in range(cotangent.ndim) if k not in positions]
        return inputs, rows_first(cotangent, self.rows[0], self.num_rows, positions, features)

    def _order(self):
        first, last = self._contracted, self._free
        return [*first, *last] if self._inputs_first else [*last, *first]

    def _matrix(self, vectors):
        """[K, *p] -> [K, i, o] or [K, o, i]"""
        order = [0, *(axis + 1 for axis in self._order())]
        size = self.sizes.i if self._inputs_first else self.sizes.o
        return vectors.transpose(order).reshape(vectors.shape[0], size, -1)

    def _parameter_like(self, matrix):
        order = self._order()
        sizes = [self._shape[axis] for axis in order]
        inverse = [int(axis) for axis in np.argsort(order)]
        return matrix.reshape(sizes).transpose(inverse).astype(self._dtype)


class Repeated(Meeting):
    """An elementwise operation of data with a parameter that is repeated over the rows."""

    def _prepare(self, function, operands):
        super()._prepare(function, operands)
        (self.parameter,) = {k for moving in self.moving.values() for k in moving}
        self._dtype = jnp.result_type(operands[self.parameter].primal)
        self._shape = jnp.shape(operands[self.parameter].primal)
        (rows,) = self.rows
        self._whole = all(
            names is None
            for value in operands
            for axis, names in enumerate(jax.typeof(value.primal).sharding.spec)
            if axis != rows.axis
        )

    @property
    def few(self) -> bool:
        """Whether the gradients of all rows are no more than the operation's output.

        Where the types say that devices have parts of them, they cannot be written one after
        another.
        """
        return (
            self._whole
            and self.num_rows * math.prod(self._shape) <= math.prod(self.outputs[0].shape) // 2
        )

    @property
    def keeps_row_gradients(self):
        return self.few and all(self.in_rows.values())

    def route(self, directions, *, late):
        if (late or directions is not None) and self.keeps_row_gradients:
            return Route.FEATURES
        return Route.TANGENT

    def sums(self, kept, vectors, cotangents, stacked, route):
        if route is not Route.FEATURES:
            return super().sums(kept, vectors, cotangents, stacked, route)
        arrays = dict(zip(self.kept, kept[0]))
        return self.sums_of_rows(self.row_gradients(arrays, *cotangents), vectors, stacked)

    def sums_of_rows(self, rows, vectors, stacked):
        """What ``sums`` gives, of ``row_gradients``."""
        rows = self.flat(rows)

        def products(vectors):
            vectors = vectors.astype(rows.dtype).reshape(-1, rows.shape[1])
            if not stacked:  # no product of matrices, which would stand in a kernel of its own
                return jnp.sum(rows * vectors, axis=1)
            return jnp.matmul(vectors, rows.T, precision="highest")

        return {path: products(vectors) for path, (vectors,) in vectors.items()}

    def row_gradients(self, arrays: dict[int, Any], cotangent: Any) -> jax.Array:
        """The gradient of the parameter by every row: the output's axes, but positions summed."""
        (rows,), wide, name = self.rows, wide_dtype(cotangent), self.eqn.primitive.name
        gradients = cotangent.astype(wide)
        if name == "mul":
            gradients = gradients * arrays[1 - self.parameter].astype(wide)
        elif name == "sub" and self.parameter == 1:
            gradients = -gradients
        others = [k for k, size in enumerate(self._shape) if size == 1 and k != rows.axis]
        return jnp.sum(gradients, axis=others, keepdims=True)

    def flat(self, rows: jax.Array) -> jax.Array:
        """``row_gradients`` as [B, F]."""
        return jnp.moveaxis(rows, self.rows[0].axis, 0).reshape(self.num_rows, -1)

    def parameter_like(self, gradient: jax.Array) -> jax.Array:
        return gradient.reshape(self._shape).astype(self._dtype)


def _loops_over_rows(eqn, operands) -> bool:
    """Whether ``row_loop`` can take this product."""
    precision = eqn.params["precision"]  # else a DotAlgorithm, with accumulators of its own
    splits = splits_rows(*(value.primal for value in operands))
    return splits and (precision is None or isinstance(precision, tuple))


def make_meeting(eqn: Any, function, operands, outputs, rows, num_rows, names) -> Meeting:
    """The kind of meeting that an equation is."""
    return _kind(eqn, operands, rows)(eqn, function, operands, outputs, rows, num_rows, names)


# By primitive, kinds of meetings that do not depend on the operands.
KINDS: dict[str, type[Meeting]] = {}
# By primitive, ``meeting(walk, eqn, operands, outputs)`` of an operation that sums over rows.
SUMMING: dict[str, Callable[..., Meeting | None]] = {}
# By primitive, ``meeting(walk, eqn, operands, outputs, places, error)`` where its kind does not
# find rows in place, as ``error`` says: they are followed by their numbers.
FOLLOWING: dict[str, Callable[..., Meeting]] = {}


def _kind(eqn, operands, rows) -> type[Meeting]:
    if eqn is not None and eqn.primitive.name in KINDS:
        return KINDS[eqn.primitive.name]
    if eqn is None or not all(isinstance(info, Rows) for info in rows):
        return Meeting
    name, moving = eqn.primitive.name, [bool(value.tangents) for value in operands]
    if len(operands) != 2 or sum(moving) != 1:
        return Meeting
    data, parameter = operands[moving[0]], operands[moving[1]]
    real = all(jnp.issubdtype(jnp.result_type(v.primal), jnp.floating) for v in operands)
    if not (data.is_data and isinstance(data.rows, Rows) and real):
        return Meeting
    if name == "dot_general" and not any(eqn.params["dimension_numbers"][1]):
        return Product if _loops_over_rows(eqn, operands) else Meeting
    (place,) = rows
    is_repeated = jnp.shape(parameter.primal)[place.axis : place.axis + 1] == (1,)
    if name in _REPEATED and place.outer * place.inner == 1 and is_repeated:
        return Repeated
    return Meeting
