"""The weight gradient by every row, one after another or few at once, dotted with all directions.

    total    = sum_b  a[b]^T c[b]                  [i, o]
    dots     = < a[b]^T c[b] , directions[k] >     [K, B]

A loop over rows that are sharded would make XLA gather them. Behind ``custom_partitioning`` every
device goes through its own rows, and two all-reduces are left: of the total over the mesh axes of
the rows, and of the dots over those of the features. On meshes with explicit or manual axes the
types of the operands say where they are, which ``custom_partitioning`` does not heed. Nor can
``jax.export`` write it down for several devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ghostjax.core.meeting import wide_dtype
from ghostjax.core.row_blocks import map_rows

# Elements of all rows' parts: so small they are all made before any is used, without a loop.
AT_ONCE = 2**20


def _products(a, c, precision):
    """a^T c for one row, with sums in float32 or wider."""
    wide = wide_dtype(a, c)

    def native(a, c):
        return jax.lax.dot_general(
            a, c, (((0,), (0,)), ((), ())), precision, preferred_element_type=wide
        )

    def widened(a, c):
        return native(a.astype(wide), c.astype(wide))

    if a.dtype != c.dtype:
        return widened(a, c)
    if a.dtype == wide:
        return native(a, c)
    # XLA's CPU backend lacks some products of 16-bit operands with a 32-bit result.
    return jax.lax.platform_dependent(a, c, cpu=widened, default=native)


def _loop(a, c, directions, precision):
    wide = wide_dtype(a, c)
    # All directions at once: a reduction for each takes as long as the product, or longer.
    matrix = directions.reshape(directions.shape[0], -1).astype(wide)

    if a.shape[0] * a.shape[-1] * c.shape[-1] <= AT_ONCE:
        parts = jax.vmap(functools.partial(_products, precision=precision))(a, c)
        flat = parts.reshape(parts.shape[0], -1)
        return jnp.sum(parts, axis=0), jnp.matmul(matrix, flat.T, precision="highest")

    def step(total, row):
        part = _products(*row, precision)
        return total + part, jnp.matmul(matrix, part.reshape(-1), precision="highest")

    total, dots = jax.lax.scan(step, jnp.zeros((a.shape[-1], c.shape[-1]), wide), (a, c))
    return total, dots.T


def _plain(precision, a, c, directions):
    """The same by ordinary products, which can be differentiated."""
    wide = wide_dtype(a, c)
    a, c, directions = (array.astype(wide) for array in (a, c, directions))
    tangents = jnp.einsum("bti,kio->kbto", a, directions, precision=precision)
    dots = jnp.sum(tangents * c[None], axis=(2, 3))
    return jnp.einsum("bti,bto->io", a, c, precision=precision), dots


def _partition(precision, mesh, operands, results):
    """Rows, positions and features stay where they are, each mesh axis with the first of them."""
    del results
    rows, positions, inputs, outputs = _axes(*operands[:2])

    def local(a, c, directions):
        total, dots = _loop(a, c, directions, precision)
        if rows or positions:
            total = jax.lax.psum(total, rows + positions)
        if positions or inputs or outputs:
            dots = jax.lax.psum(dots, positions + inputs + outputs)
        return total, dots

    placed = functools.partial(_placed, mesh)
    operands = placed(rows, positions, inputs), placed(rows, positions, outputs)
    results = placed(inputs, outputs), placed((), rows)
    return mesh, local, results, (*operands, placed((), inputs, outputs))


def _axes(a, c):
    """Of the mesh, those of rows, positions, inputs and outputs: each with the first of them."""
    taken: set[str] = set()

    def axes(operand, number):
        spec = operand.sharding.spec
        names = spec[number] if number < len(spec) else None
        names = (names,) if isinstance(names, str) else names or ()
        found = tuple(name for name in names if name not in taken)
        taken.update(found)
        return found

    return axes(a, 0), axes(a, 1), axes(a, 2), axes(c, 2)


def _placed(mesh, *spec):
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


_partitioned = custom_partitioning(_loop, static_argnums=(3,))
_partitioned.def_partition(partition=_partition, sharding_rule="b t i, b t o, k i o -> i o, k b")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def row_loop(
    precision: Any, a: jax.Array, c: jax.Array, directions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(total [i, o], dots [K, B]) of a [B, T, i], c [B, T, o] and directions [K, i, o].

    Products take the operands' dtype, and ``precision`` as in ``jax.lax.dot_general``; sums are
    float32 or wider.
    """

    @jax.custom_batching.sequential_vmap
    def loop(*operands):
        return _partitioned(*operands, precision)

    return loop(a, c, directions)


@row_loop.defjvp
def _(precision, operands, tangents):
    plain = functools.partial(_plain, precision)
    return row_loop(precision, *operands), jax.jvp(plain, operands, tangents)[1]


def row_squares(precision: Any, a: jax.Array, c: jax.Array) -> jax.Array:
    """sum_io (sum_t a_bti c_bto)^2, [B]: one row's part of the weight gradient at a time."""
    return map_rows(lambda row: jnp.sum(jnp.square(_products(*row, precision))), (a, c))
