"""A number of one row after another, of each row on the device that has it.

    numbers[b] = function(arrays[0][b], arrays[1][b], ...)

``lax.map`` over rows that are sharded makes XLA gather them. Behind ``custom_partitioning`` every
device goes through its own rows; only what else of them is split is gathered.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax.core.place_rules import Rows

WHOLE = PartitionSpec()


def map_rows(function: Callable[[Any], jax.Array], arrays: Any, block: int = 1) -> jax.Array:
    """``jax.lax.map`` to scalars, [B], of a tree of arrays [B, ...]; ``block`` rows at a time.

    ``function`` must not close over traced values.
    """
    leaves, treedef = jax.tree.flatten(arrays)

    def loop(*leaves):
        size = min(block, leaves[0].shape[0])
        return [jax.lax.map(function, treedef.unflatten(leaves), batch_size=size)]

    return on_their_devices(loop, leaves, [Rows(0)] * len(leaves))[0]


def on_their_devices(
    loop: Callable[..., list[jax.Array]], arrays: Sequence[Any], places: Sequence[Rows | None]
) -> list[jax.Array]:
    """``loop(*arrays)``, a list of numbers [B], on every device of the rows that it has.

    Args:
      loop: a loop over as many rows as its arrays have; must not close over traced values.
      places: of every array, where its rows are, with ``outer`` 1; None where all rows need all.
    """
    if not splits_rows(*arrays):
        return loop(*arrays)
    is_key = [jnp.issubdtype(array.dtype, jax.dtypes.prng_key) for array in arrays]
    impls = [jax.random.key_impl(a) if key else None for a, key in zip(arrays, is_key)]
    # Sharding rules count the axes of what XLA sees of keys, which are numbers.
    arrays = [jax.random.key_data(a) if key else a for a, key in zip(arrays, is_key)]
    # An axis that rows share may be split across a row. Of one of rows alone, XLA sends what is
    # missing of them.
    arrays = [_apart(array, place) for array, place in zip(arrays, places)]

    def plain(*arrays):
        arrays = [_merged(array, place) for array, place in zip(arrays, places)]
        wrap = jax.random.wrap_key_data
        return loop(*(wrap(a, impl=impl) if impl else a for a, impl in zip(arrays, impls)))

    partitioned = custom_partitioning(plain)

    def partition(mesh, operands, results):
        (rows, *_) = (
            (*operand.sharding.spec, *[None] * len(operand.shape))[place.axis]
            for operand, place in zip(operands, places)
            if place is not None
        )
        own = [PartitionSpec(*[None] * place.axis, rows) if place else WHOLE for place in places]
        placed = tuple(NamedSharding(mesh, spec) for spec in own)
        return mesh, plain, [NamedSharding(mesh, PartitionSpec(rows)) for _ in results], placed

    letters = (f"a{number}" for number in itertools.count())
    factors, others = [], []
    for array, place in zip(arrays, places):
        own = list(itertools.islice(letters, array.ndim))
        others += [letter for axis, letter in enumerate(own) if not place or axis != place.axis]
        if place is not None:
            own[place.axis] = "b"
        factors.append(" ".join(own))
    numbers = ["b"] * len(jax.eval_shape(plain, *arrays))
    partitioned.def_partition(
        partition=partition,
        sharding_rule=", ".join(factors) + " -> " + ", ".join(numbers),
        need_replication_factors=tuple(others),
    )
    return differentiable(partitioned, plain)(*arrays)


def _apart(array: jax.Array, place: Rows | None) -> jax.Array:
    """With an axis of rows alone, before that of what they share theirs with."""
    if place is None or place.inner == 1:
        return array
    axis, shape = place.axis, array.shape
    return array.reshape(*shape[:axis], shape[axis] // place.inner, place.inner, *shape[axis + 1 :])


def _merged(array: jax.Array, place: Rows | None) -> jax.Array:
    """As it was before."""
    if place is None or place.inner == 1:
        return array
    return jax.lax.collapse(array, place.axis, place.axis + 2)


def differentiable(
    partitioned: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """``partitioned``, which has no derivative and no batching rule, with those of ``plain``."""

    @jax.custom_jvp
    def run(*operands):
        return jax.custom_batching.sequential_vmap(lambda *own: partitioned(*own))(*operands)

    @run.defjvp
    def _(operands, tangents):
        return run(*operands), jax.jvp(plain, operands, tangents)[1]

    return run


def splits_rows(*arrays: Any) -> bool:
    """Whether ``custom_partitioning`` can split loops over them: not by explicit or manual axes of
    a mesh, which types tell."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    automatic = all(kind == AxisType.Auto for mesh in meshes for kind in mesh.axis_types)
    # XLA's older partitioner ends the process at operations that only the newer one can split.
    return automatic and getattr(jax.config, "jax_use_shardy_partitioner", True)
