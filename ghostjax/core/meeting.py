"""Meetings: where parameters meet data, and the inner products that come out there.

A meeting is one equation whose operands are data and values made of parameters alone. From what it
keeps of its operands, the cotangent c of its output and a direction G at its parameter operand
follow the dots of that meeting: < c_i , t_i > with t = J_W op(x, .) . G, for every row i. Routes to
the same numbers that cost less for some shapes are in ``routes``.
"""

import contextlib
import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._dtypes import wide_dtype
from ghostjax._jaxprs import bind, is_inexact, is_var, live_equations
from ghostjax.core.channel import passed_on, primals
from ghostjax.core.lookups import as_gradients_see
from ghostjax.core.places import Rows, split_rows
from ghostjax.core.values import Value, paths_of


def tangents_of(function, primals: Sequence[Any], moving: Sequence[int], vectors) -> list[Any]:
    """Of a function's outputs, when the operands ``moving`` move along ``vectors``."""

    def of_moving(*arrays):
        operands = list(primals)
        for position, array in zip(moving, arrays):
            operands[position] = array
        return function(operands)

    return jax.jvp(of_moving, [primals[position] for position in moving], vectors)[1]


class TangentProgram:
    """The tangents of an operation's outputs, as a function of no more operands than they need.

    What is not needed is not kept for the backward pass: the tangent of ``x + bias`` needs no x.
    """

    def __init__(
        self, function: Callable[..., list], primals: Sequence[Any], moving: Sequence[int]
    ):
        def tangents(primals, vectors):
            return [_dense(leaf) for leaf in tangents_of(function, primals, moving, vectors)]

        closed = jax.make_jaxpr(tangents)(primals, [primals[position] for position in moving])
        moves = [False] * len(primals) + [True] * len(moving)
        jaxpr = as_gradients_see(closed.jaxpr, moves)
        self._needed, live = live_equations(jaxpr, [True] * len(jaxpr.outvars))
        self._jaxpr, self.consts = jaxpr, closed.consts
        self._inputs, self._vectors = jaxpr.invars[: len(primals)], jaxpr.invars[len(primals) :]
        self.kept = [k for k, var in enumerate(self._inputs) if var in live]

    def at(self, primals: Sequence[Any]) -> Callable[[Sequence[Any]], list[Any]]:
        """The tangents as a function of the direction alone."""
        return functools.partial(self, dict(enumerate(primals)), self.consts)

    def __call__(self, operands: dict[int, Any], consts, vectors: Sequence[Any]) -> list[Any]:
        values = dict(zip(self._jaxpr.constvars, consts, strict=True))
        values.update((self._inputs[k], operands[k]) for k in self.kept)
        values.update(zip(self._vectors, vectors, strict=True))

        def read(atom):
            return values[atom] if is_var(atom) else atom.val

        for eqn in self._needed:
            outputs = bind(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in self._jaxpr.outvars]


class Route(enum.StrEnum):
    """The ways from a meeting to its dots; what each costs is said in ``routes``.

    Attributes:
      TANGENT: the direction is pushed through the operation, and paired with the cotangent.
      ROWS: the weight gradient is made row by row, and every row's part dotted with all directions.
      FEATURES: the gradient of what is repeated over rows is made per row, then dotted with all.
      RULE: of a custom_vjp function, what its rule sums over rows is dotted with all.
    """

    TANGENT = "tangent"
    ROWS = "rows"
    FEATURES = "features"
    RULE = "rule"


class Meeting:
    """What is static about one meeting; arrays are handed in.

    Attributes:
      eqn: the equation, None for the value of a loop's carry or the loss.
      names: of all parameters.
      moving: by parameter, the positions of the operands that depend on it.
      rows: where the rows are, per output.
      in_rows: by parameter, whether its dots belong to rows; if not, they are one scalar.
      outputs: shapes and dtypes.
      differentiable: positions of the outputs that have cotangents.
      kept: positions of the operands whose values ``sums`` needs.
      needs_data: whether data are among these.
      mixes_rows: whether what rows give depends on data of other rows, such as how many count.
      in_branch: whether it is inside of a branch, which may not be taken.
    """

    mixes_rows = False
    in_branch = False

    def __init__(
        self,
        eqn: Any,
        function: Callable[[Sequence[Any]], list],
        operands: Sequence[Value],
        outputs: Sequence[Any],
        rows: Sequence[Any],
        num_rows: int | None,
        names: Sequence[str],
    ):
        self.eqn, self.names = eqn, names
        self.rows = list(rows)
        self.num_rows = num_rows
        self.outputs = [jax.ShapeDtypeStruct(jnp.shape(o), jnp.result_type(o)) for o in outputs]
        self.differentiable = [k for k, output in enumerate(outputs) if is_inexact(output)]
        self.moving = {
            path: tuple(k for k, value in enumerate(operands) if path in value.tangents)
            for path in paths_of(operands)
        }
        self.in_rows: dict[int, bool] = {}
        self._prepare(function, operands)

    def _prepare(self, function, operands):
        primals = [value.primal for value in operands]
        self._programs = {
            moving: TangentProgram(function, primals, moving)
            for moving in set(self.moving.values())
        }
        programs = self._programs.values()
        self.kept = sorted({position for program in programs for position in program.kept})
        self.needs_data = any(operands[position].is_data for position in self.kept)
        self._consts = {moving: program.consts for moving, program in self._programs.items()}

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """In which its operation was traced: axes of the mesh may be explicit there or not."""
        return contextlib.nullcontext() if self.eqn is None else self.eqn.ctx.manager

    def keep(self, operands: Sequence[Value]) -> Any:
        """The arrays that ``sums`` needs. Called once, where the meeting was made."""
        return [operands[position].primal for position in self.kept], self.take_consts()

    def take_consts(self) -> Any:
        """Arrays of the trace in which the meeting was made, which must not leave it otherwise."""
        consts = [self._consts[moving] for moving in sorted(self._programs)]
        del self._consts
        return consts

    def route(self, directions: int | None, *, late: bool) -> Route:
        """The route that costs least, for K directions; None where they are not stacked.

        ``late``: the gradient has been made before, so that no route can make it on its way.
        """
        del directions, late
        return Route.TANGENT

    def sums(
        self,
        kept: Any,
        vectors: dict[int, Sequence[Any]],
        cotangents: Sequence[Any],
        stacked: bool,
        route: Route,
    ) -> dict[int, Any]:
        """By parameter, its dots [B] (a scalar where they belong to no row), or [K, ...].

        Args:
          kept: what ``keep`` gave.
          vectors: by parameter, the direction at the operands that move.
          cotangents: of the differentiable outputs.
          route: one that ``route`` gives for as many directions.
        """
        del route
        arrays, consts = kept
        operands = dict(zip(self.kept, arrays))
        consts = dict(zip(sorted(self._programs), consts))

        def one(path, vectors):
            moving = self.moving[path]
            tangents = self._programs[moving](operands, consts[moving], vectors)
            return self._paired(path, cotangents, [tangents[k] for k in self.differentiable])

        return {
            path: _for_each(functools.partial(one, path), found) if stacked else one(path, found)
            for path, found in vectors.items()
        }

    def _paired(self, path, cotangents, tangents):
        where = [self.rows[k] if self.in_rows[path] else None for k in self.differentiable]
        triples = zip(cotangents, tangents, where)
        return sum(row_sums(*triple, self.num_rows) for triple in triples)

    def has_rest(self, path: int) -> bool:
        """Whether there may be dots that belong to no example."""
        return not self.in_rows[path]

    def parted(self, path: int, sums: Any) -> tuple[Any, Any]:
        """Of a parameter's sums, those of examples and that of nobody, or None."""
        return (sums, None) if self.in_rows[path] else (None, sums)

    @property
    def keeps_row_gradients(self) -> bool:
        """Whether late directions need no factors: ``row_gradients`` are less, and do."""
        return False

    def takes_gradient(self, route: Route) -> int | None:
        """The operand whose gradient that route makes on its way, by ``sums_and_gradient``."""
        del route
        return None


def _for_each(function: Callable[[Any], Any], stacked: Any) -> Any:
    """Of every direction, all at once if JAX can."""
    try:
        return jax.vmap(function)(stacked)
    except NotImplementedError:  # as of ragged_dot
        return jax.lax.map(function, stacked)


@dataclasses.dataclass(frozen=True)
class Cells:
    """Places along several axes that are summed apart, the last axis the fastest; along no axis,
    there is but one cell."""

    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SummedCells:
    """Cells of what a derivative rule sums: where it has each of their axes, and their sizes."""

    places: tuple[Rows, ...]
    sizes: tuple[int, ...]

    def numbers(self, shape: Sequence[int]) -> jax.Array:
        """Of the cells at every place, the last axis of cells the fastest; size 1 elsewhere."""
        found = jnp.zeros([1] * len(shape), jnp.int32)
        for place, size in zip(self.places, self.sizes):
            along = jnp.arange(shape[place.axis], dtype=jnp.int32) // place.inner % size
            others = [axis for axis in range(len(shape)) if axis != place.axis]
            found = found * size + jnp.expand_dims(along, others)
        return found

    def sums(self, product: jax.Array) -> jax.Array:
        """Over all places of a cell."""
        axes = {place.axis for place in self.places}
        others = [axis for axis in range(product.ndim) if axis not in axes]
        zeros = jnp.zeros(math.prod(self.sizes), product.dtype)
        numbers = self.numbers(product.shape).ravel()
        return zeros.at[numbers].add(jnp.sum(product, axis=others).ravel())


def where_taken(found: Any, cotangents: Sequence[Any]) -> Any:
    """Zeros where a branch is not taken: operands are zeros there too, by which there may be a
    division."""
    is_taken = functools.reduce(jnp.logical_or, [jnp.any(c != 0) for c in cotangents])
    return jax.tree.map(lambda leaf: jnp.where(is_taken, leaf, jnp.zeros_like(leaf)), found)


def _dense(tangent: Any) -> Any:
    """Integer outputs have tangents without a value."""
    return jnp.zeros(tangent.shape) if tangent.dtype == jax.dtypes.float0 else tangent


def paired(cotangents: Any, tangents: Any) -> jax.Array:
    """The products that add up to <cotangents, tangents>, in float32 or wider.

    Of complex values the real part, without a conjugate: that is what JAX's cotangents mean.
    """
    if jnp.iscomplexobj(cotangents) or jnp.iscomplexobj(tangents):
        parts = [(jnp.real(array), jnp.imag(array)) for array in (cotangents, tangents)]
        return paired(parts[0][0], parts[1][0]) - paired(parts[0][1], parts[1][1])
    wide = wide_dtype(cotangents)
    return cotangents.astype(wide) * tangents.astype(wide)


def row_sums(
    cotangents: Any, tangents: Any, rows: Rows | Cells | SummedCells | None, num_rows: int | None
) -> jax.Array:
    """sum of cotangents * tangents over everything but the rows, in float32 or wider: [B].

    A scalar where ``rows`` is None: the sum over everything.
    """
    product = paired(cotangents, tangents)
    if rows is None:
        return jnp.sum(product)
    if isinstance(rows, SummedCells):
        return rows.sums(product)
    if isinstance(rows, Cells):
        others = [k for k in range(product.ndim) if k not in rows.axes]
        return jnp.sum(product, axis=others).reshape(-1)
    if rows.outer * rows.inner == 1:  # without a reshape, which explicit shardings may forbid
        return jnp.sum(product, axis=[k for k in range(product.ndim) if k != rows.axis])
    return jnp.sum(split_rows(product, rows, num_rows), axis=1)


def weighted(
    array: jax.Array, rows: Rows | Cells | SummedCells | None, num_rows: int | None, weights: Any
) -> jax.Array:
    """Every row times its weight [B]; zeros where that is zero, whatever was there."""
    places = weights_at(array, rows, num_rows, weights)
    zeros = jnp.zeros_like(array)
    if places.dtype == bool:
        return jnp.where(places, array, zeros)
    wide = np.promote_types(array.dtype, places.dtype)
    product = array.astype(wide) * places.astype(wide)
    return jnp.where(places == 0, zeros, product.astype(array.dtype))


def weights_at(
    array: jax.Array, rows: Rows | Cells | SummedCells | None, num_rows: int | None, weights: Any
) -> jax.Array:
    """The weight [B] of every place of an array, broadcast over what is not told apart.

    Where ``rows`` is None there is but one row, and one weight.
    """
    if rows is None:
        return jnp.reshape(weights, ())
    if isinstance(rows, Cells):
        shape = [size if axis in rows.axes else 1 for axis, size in enumerate(array.shape)]
        return weights.reshape(shape)
    if isinstance(rows, SummedCells):
        return weights[rows.numbers(array.shape)]
    places = weights
    if rows.outer * rows.inner != 1:
        shape = (rows.outer, num_rows, rows.inner)
        places = jnp.broadcast_to(weights[None, :, None], shape).reshape(-1)
    return jnp.expand_dims(places, [axis for axis in range(array.ndim) if axis != rows.axis])


@jax.custom_vjp
def one_per_row(outputs: Sequence[Any], marker: Any) -> list[Any]:
    """``outputs`` as they are, but vectorized wherever the scalar ``marker`` is.

    The cotangents of what vectorization need not repeat come summed over the rows, too late for a
    channel that is to tell them apart.
    """
    return _repeated(outputs, marker)


def _repeated(outputs, marker):
    return [jax.lax.select_n(marker == 0, output, output) for output in outputs]


one_per_row.defvjp(
    lambda outputs, marker: (_repeated(primals(outputs), marker.value), None),
    lambda _, cotangents: (passed_on(cotangents), None),
    symbolic_zeros=True,
)
