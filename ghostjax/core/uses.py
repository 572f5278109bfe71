"""Squared norms over pairs of positions of a matrix that is used several times, or looked up in.

Every use u gives the matrix the gradient dW_u = sum_t a_ut b_ut^T, where a_ut is a unit vector if
the use is a look-up:

    |dW|^2 = sum_uv < dW_u , dW_v > = sum_uv sum_ts (a_ut . a_vs) (b_ut . b_vs)
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from ghostjax.core.meeting import Meeting, wide_dtype
from ghostjax.core.place_rules import Rows
from ghostjax.core.places import rows_first
from ghostjax.core.routes import Product, operations_per_number
from ghostjax.core.row_blocks import map_rows


@dataclasses.dataclass(frozen=True)
class Use:
    """What is static about one use of a matrix [a, b]: positions of a row, and its kind."""

    meeting: Meeting
    axes: tuple[int, int]
    positions: int

    @property
    def looks_up(self) -> bool:
        return not isinstance(self.meeting, Product)

    @property
    def shape(self) -> tuple[int, int]:
        """[a, b]"""
        if self.looks_up:
            return self.meeting.eqn.invars[0].aval.shape
        sizes = self.meeting.sizes
        is_first = self.axes[self.meeting.contracted[0]] == 0
        return (sizes.i, sizes.o) if is_first else (sizes.o, sizes.i)

    def factors(self, arrays: dict[int, Any], cotangent: Any) -> tuple[Any, Any]:
        """Along the matrix's first axis [B, T, a], or numbers [B, T], -1 for none; and along the
        second, [B, T, b]."""
        meeting = self.meeting
        if not self.looks_up:
            inputs, outputs = meeting.factors(arrays[1 - meeting.parameter], cotangent)
            is_first = self.axes[meeting.contracted[0]] == 0
            return (inputs, outputs) if is_first else (outputs, inputs)
        size = meeting.eqn.invars[0].aval.shape[0]
        places, rows, count = range(cotangent.ndim - 1), meeting.rows[0], meeting.num_rows
        ids = rows_first(arrays[1], rows, count, places, [cotangent.ndim - 1])[..., 0]
        if meeting.eqn.params["mode"] in _CLAMPING:
            ids = jnp.clip(ids, 0, size - 1)
        ids = jnp.where((ids >= 0) & (ids < size), ids, -1)
        return ids, rows_first(cotangent, rows, count, places, [cotangent.ndim - 1])


# What else is out of range is nobody's: gradients drop it, see ``lookups``.
_CLAMPING = (GatherScatterMode.CLIP, GatherScatterMode.ONE_HOT)


def use_of(meeting: Meeting, axes: tuple[int, ...] | None) -> Use | None:
    """The use that a meeting is of a parameter whose axes the operand has; None if another one."""
    if axes is None or len(axes) != 2 or not all(isinstance(info, Rows) for info in meeting.rows):
        return None
    if isinstance(meeting, Product):
        return Use(meeting, axes, meeting.sizes.t) if len(meeting.contracted) == 1 else None
    if meeting.eqn is None or meeting.eqn.primitive.name != "gather" or axes != (0, 1):
        return None
    table, ids = (var.aval for var in meeting.eqn.invars)
    dims, (output,) = meeting.eqn.params["dimension_numbers"], meeting.outputs
    takes_rows = (
        meeting.moving and set(meeting.moving.values()) == {(0,)}
        and (dims.collapsed_slice_dims, dims.start_index_map) == ((0,), (0,))
        and dims.offset_dims == (len(output.shape) - 1,)
        and not dims.operand_batching_dims
        and meeting.eqn.params["slice_sizes"] == (1, table.shape[1])
        and ids.shape == (*output.shape[:-1], 1)
    )  # fmt: skip
    positions = math.prod(output.shape[:-1]) // (meeting.num_rows or 1)
    return Use(meeting, axes, positions) if takes_rows else None


def pairs_cost_less(uses: Sequence[Use]) -> bool:
    """Whether norms over pairs of positions are cheaper than by a row's gradient [a, b].

    Of two products pairs take t s (a + b) multiplications, of others t s b. Of a row's gradient,
    each product takes t a b; and it is written and read once for every use.
    """
    first, second = uses[0].shape
    pairs = sum(
        (1 if u is v else 2) * u.positions * v.positions
        * (second if u.looks_up or v.looks_up else first + second)
        for u, v in itertools.combinations_with_replacement(uses, 2)
    )  # fmt: skip
    products = sum(u.positions for u in uses if not u.looks_up)
    return pairs < first * second * (products + 2 * len(uses) * operations_per_number())


def pair_squares(factors: Sequence[tuple[Any, Any]]) -> jax.Array:
    """Of all uses, [B]; in float32 or wider. One row after another, and one pair of uses, so that
    factors are not needed longer than they have to be."""
    wide = wide_dtype(*(right for _, right in factors))
    factors = [(_as_float(left, wide), right.astype(wide)) for left, right in factors]
    pairs = itertools.combinations_with_replacement(factors, 2)
    return sum((1 if first is second else 2) * _products(first, second) for first, second in pairs)


def _products(first, second) -> jax.Array:
    """< dW_u , dW_v > of all rows, [B]."""
    (left, right), (other_left, other_right) = sorted([first, second], key=lambda f: f[0].ndim)
    if left.ndim == other_left.ndim or left.shape[1] >= other_left.shape[2]:
        return map_rows(_product, ((left, right), (other_left, other_right)))
    # Of a vocabulary what is looked up: the rest is free when the product's cotangent is there.
    chosen = jax.vmap(_chosen)(left, other_left)
    return map_rows(_product_of_chosen, (left, right, chosen, other_right))


def _as_float(left: jax.Array, wide: Any) -> jax.Array:
    return left.astype(wide) if jnp.issubdtype(left.dtype, jnp.inexact) else left


def _product(pair) -> jax.Array:
    """< dW_u , dW_v > of one row."""
    (left, right), (other_left, other_right) = pair
    if left.ndim < other_left.ndim:
        return _product_of_chosen((left, right, _chosen(left, other_left), other_right))
    rights = jnp.matmul(right, other_right.T, precision="highest")
    if left.ndim == 2:
        return jnp.sum(jnp.matmul(left, other_left.T, precision="highest") * rights)
    is_same = (left >= 0)[:, None] & (left[:, None] == other_left[None])
    return jnp.sum(jnp.where(is_same, rights, jnp.zeros_like(rights)))


def _chosen(ids: jax.Array, left: jax.Array) -> jax.Array:
    """[t, s] of numbers [s] and a factor [t, a]."""
    return jnp.take(left, jnp.maximum(ids, 0), axis=1)


def _product_of_chosen(factors) -> jax.Array:
    """The same of a look-up and a product."""
    ids, right, chosen, other_right = factors
    rights = jnp.matmul(other_right, right.T, precision="highest")
    return jnp.sum(jnp.where(ids >= 0, chosen * rights, jnp.zeros_like(rights)))
