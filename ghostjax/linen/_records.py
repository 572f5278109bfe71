"""Records: one parameter's per-row gradients at one call, not multiplied out.

A record holds R rows (all N, or a slice of them) and knows three things about the per-row gradients
g_r it stands for. With ``p`` the parameter's shape:

    total()           sum_r g_r                        [*p]
    dots(direction)   <g_r, direction>                 [R]
    per_row()         g_r                              [R, *p]   (the one that takes memory)

Sums are in float32, whatever the dtype of the operands; float64 stays float64.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp


def accumulation_dtype(*arrays: Any) -> jnp.dtype:
    """float32 for everything narrower, float64 for float64."""
    wide = any(jnp.result_type(array) == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Products in the operands' dtype, if they have one in common; sums in float32 or wider."""
    wide = accumulation_dtype(*operands)

    def native(*operands):
        return jnp.einsum(spec, *operands, preferred_element_type=wide)

    def widened(*operands):
        return jnp.einsum(spec, *(operand.astype(wide) for operand in operands))

    if len({operand.dtype for operand in operands}) > 1:
        return widened(*operands)
    if operands[0].dtype == wide:
        return native(*operands)
    # XLA's CPU backend lacks some products of 16-bit operands with a 32-bit result.
    return jax.lax.platform_dependent(*operands, cpu=widened, default=native)


class Record:
    """Base: slicing rows is the same for every record, as all its arrays lead with the rows."""

    def rows(self, start: int | None, stop: int | None) -> Self:
        return jax.tree.map(lambda array: array[start:stop], self)

    def total(self) -> jax.Array:
        raise NotImplementedError

    def dots(self, direction: jax.Array) -> jax.Array:
        raise NotImplementedError

    def per_row(self) -> jax.Array:
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGradients(Record):
    """The per-row gradients themselves: for small parameters (scales, biases)."""

    gradients: jax.Array  # [R, *p]

    def total(self):
        return jnp.sum(self.gradients, axis=0, dtype=accumulation_dtype(self.gradients))

    def dots(self, direction):
        rows = self.gradients.reshape(self.gradients.shape[0], direction.size)
        dtype = accumulation_dtype(rows)
        return _einsum("bf,f->b", rows.astype(dtype), direction.reshape(-1).astype(dtype))

    def per_row(self):
        return self.gradients.astype(accumulation_dtype(self.gradients))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors(Record):
    """A matrix product: g_r = sum_t inputs[r, t, :] (x) cotangents[r, t, :].

    The matrix [i, o] is reshaped to ``sizes`` (input sizes, then output sizes) and transposed by
    ``order`` to give the parameter: kernels of several axes, or stored the other way round.
    """

    inputs: jax.Array  # [R, T, i]
    cotangents: jax.Array  # [R, T, o]
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def _parameter(self, matrix, leading=()):
        offset = len(leading)
        order = (*range(offset), *(axis + offset for axis in self.order))
        return matrix.reshape(*leading, *self.sizes).transpose(order)

    def _matrix(self, parameter):
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        columns = self.cotangents.shape[-1]
        return parameter.transpose(inverse).reshape(self.inputs.shape[-1], columns)

    def total(self):
        return self._parameter(_einsum("vsi,vso->io", self.inputs, self.cotangents))

    def dots(self, direction):
        matrix = self._matrix(direction)
        if self.inputs.dtype == jnp.bfloat16:
            # bfloat16 has the range of float32, so the product can stay in the model's dtype;
            # float16 does not, and keeps a float32 direction.
            matrix = matrix.astype(jnp.bfloat16)
        tangents = _einsum("bti,io->bto", self.inputs, matrix)
        return jnp.einsum("bto,bto->b", self.cotangents.astype(tangents.dtype), tangents)

    def per_row(self):
        rows = _einsum("nti,nto->nio", self.inputs, self.cotangents)
        return self._parameter(rows, leading=rows.shape[:1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lookup(Record):
    """A table look-up: g_r adds cotangents[r, t, :] to row ids[r, t] of the table.

    Ids outside the table have no gradient, and negative ones count from its end, as in
    ``jnp.take``. A record that travels as a cotangent has its ids as exact float32 integers.
    """

    ids: jax.Array  # [R, T]
    cotangents: jax.Array  # [R, T, F]
    table_size: int = dataclasses.field(metadata={"static": True})

    def _scatter(self, ids, cotangents):
        table = jnp.zeros((self.table_size, cotangents.shape[-1]), accumulation_dtype(cotangents))
        return table.at[ids.astype(jnp.int32)].add(cotangents.astype(table.dtype), mode="drop")

    def total(self):
        return self._scatter(self.ids, self.cotangents)

    def dots(self, direction):
        looked_up = direction.at[self.ids.astype(jnp.int32)].get(mode="fill", fill_value=0)
        return jnp.einsum("btf,btf->b", self.cotangents.astype(looked_up.dtype), looked_up)

    def per_row(self):
        return jax.vmap(self._scatter)(self.ids, self.cotangents)


def gram_is_cheaper(b: int, v: int, t: int, s: int, i: int, o: int) -> bool:
    """Whether einsum("bti,bto,vsi,vso->b") is cheaper over pairs of positions than multiplied out.

    Gram products over all pairs of positions take b t v s (i + o) multiplications. Multiplied out,
    the validation total takes v s i o and its product with the training rows b t i o.
    """
    return b * t * v * s * (i + o) < (b * t + v * s) * i * o


def _merge(records: Sequence[Factors]) -> Factors:
    """Several calls of one layer are one call over all their positions."""
    first = records[0]
    if len(records) == 1:
        return first
    return dataclasses.replace(
        first,
        inputs=jnp.concatenate([record.inputs for record in records], axis=1),
        cotangents=jnp.concatenate([record.cotangents for record in records], axis=1),
    )


def _are_one_layer(records: Sequence[Record]) -> bool:
    """Whether all are products with one kernel, laid out in one way."""
    layouts = {
        (record.sizes, record.order) if isinstance(record, Factors) else None for record in records
    }
    return len(layouts) == 1 and None not in layouts


def _gram_dots(train: Factors, val: Factors) -> jax.Array:
    inputs = _einsum("bti,vsi->btvs", train.inputs, val.inputs)
    cotangents = _einsum("bto,vso->btvs", train.cotangents, val.cotangents)
    return jnp.einsum("btvs,btvs->b", inputs, cotangents)


def contract(records: Sequence[Record], num_train: int) -> jax.Array:
    """Dots [B] of each training row with the sum over validation rows, for one parameter.

    ``records`` are all the calls that used the parameter, so every pair of a call on the training
    side and a call on the validation side is counted.
    """
    train = [record.rows(None, num_train) for record in records]
    val = [record.rows(num_train, None) for record in records]
    if _are_one_layer(records):
        merged, merged_val = _merge(train), _merge(val)
        (b, t, i), (v, s, o) = merged.inputs.shape, merged_val.cotangents.shape
        if gram_is_cheaper(b, v, t, s, i, o):
            return _gram_dots(merged, merged_val)
    direction = sum(record.total() for record in val)
    return sum(record.dots(direction) for record in train)


def flatten_positions(array: jax.Array, features: int) -> jax.Array:
    """[R, ..., *features] -> [R, T, F], where ``features`` is the number of feature axes."""
    shape = array.shape
    split = array.ndim - features
    return array.reshape(shape[0], math.prod(shape[1:split]), math.prod(shape[split:]))
