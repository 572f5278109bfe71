"""The weight gradient of one row after another, each dotted with all directions.

    total    = sum_b  a[b]^T c[b]                  [i, o]
    dots     = < a[b]^T c[b] , directions[k] >     [K, B]

A loop over rows that are sharded would make XLA gather them. Behind ``custom_partitioning`` every
device goes through its own rows, and two all-reduces are left: of the total over the mesh axes of
the rows, and of the dots over those of the features.
"""

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ghostjax._walk._meeting import wide_dtype


def _products(a, c):
    """a^T c for one row, with sums in float32 or wider."""
    wide = wide_dtype(a, c)

    def native(a, c):
        return jax.lax.dot_general(a, c, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def widened(a, c):
        return native(a.astype(wide), c.astype(wide))

    if a.dtype != c.dtype:
        return widened(a, c)
    if a.dtype == wide:
        return native(a, c)
    # XLA's CPU backend lacks some products of 16-bit operands with a 32-bit result.
    return jax.lax.platform_dependent(a, c, cpu=widened, default=native)


def _loop(a, c, directions):
    wide = wide_dtype(a, c)

    def step(total, row):
        part = _products(*row)
        dots = [jnp.sum(part * direction.astype(wide)) for direction in directions]
        return total + part, jnp.stack(dots)

    total, dots = jax.lax.scan(step, jnp.zeros((a.shape[-1], c.shape[-1]), wide), (a, c))
    return total, dots.T


def _plain(a, c, directions):
    """The same by ordinary products, which can be differentiated."""
    wide = wide_dtype(a, c)
    a, c, directions = (array.astype(wide) for array in (a, c, directions))
    tangents = jnp.einsum("bti,kio->kbto", a, directions)
    return jnp.einsum("bti,bto->io", a, c), jnp.einsum("kbto,bto->kb", tangents, c)


def _partition(mesh, operands, results):
    del results

    def axis(operand, number):
        spec = operand.sharding.spec
        return spec[number] if number < len(spec) else None

    a, c, _ = operands
    rows, inputs, outputs = axis(a, 0), axis(a, 2), axis(c, 2)

    def local(a, c, directions):
        total, dots = _loop(a, c, directions)
        if rows is not None:
            total = jax.lax.psum(total, rows)
        features = [name for name in (inputs, outputs) if name is not None]
        if features:
            dots = jax.lax.psum(dots, jax.tree.leaves(features))
        return total, dots

    def placed(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    operands = (
        placed(rows, None, inputs),
        placed(rows, None, outputs),
        placed(None, inputs, outputs),
    )
    return mesh, local, (placed(inputs, outputs), placed(None, rows)), operands


_partitioned = custom_partitioning(_loop)
_partitioned.def_partition(partition=_partition, sharding_rule="b t i, b t o, k i o -> i o, k b")
_sequential = jax.custom_batching.sequential_vmap(lambda *operands: _partitioned(*operands))


@jax.custom_jvp
def row_loop(a: jax.Array, c: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(total [i, o], dots [K, B]) of a [B, T, i], c [B, T, o] and directions [K, i, o].

    Products take the operands' dtype; sums are float32 or wider.
    """
    return _sequential(a, c, directions)


@row_loop.defjvp
def _(operands, tangents):
    return row_loop(*operands), jax.jvp(_plain, operands, tangents)[1]
