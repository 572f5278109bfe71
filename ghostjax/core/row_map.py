"""A number of one row after another, of each row on the device that has it.

    numbers[b] = function(arrays[0][b], arrays[1][b], ...)

``lax.map`` over rows that are sharded makes XLA gather them. Behind ``custom_partitioning`` every
device goes through its own rows; only what else of them is split is gathered.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def map_rows(function: Callable[[Any], jax.Array], arrays: Any, block: int = 1) -> jax.Array:
    """``jax.lax.map`` to scalars, [B], of a tree of arrays [B, ...]; ``block`` rows at a time.

    ``function`` must not close over traced values.
    """
    leaves, treedef = jax.tree.flatten(arrays)

    def plain(*leaves):
        size = min(block, leaves[0].shape[0])
        return jax.lax.map(function, treedef.unflatten(leaves), batch_size=size)

    if not splits_rows(*leaves):
        return plain(*leaves)
    partitioned = custom_partitioning(plain)

    def partition(mesh, operands, results):
        del results
        rows = (*operands[0].sharding.spec, None)[0]
        placed = NamedSharding(mesh, PartitionSpec(rows))
        return mesh, plain, placed, (placed,) * len(operands)

    letters = (f"a{number}" for number in itertools.count())
    others = [list(itertools.islice(letters, leaf.ndim - 1)) for leaf in leaves]
    partitioned.def_partition(
        partition=partition,
        sharding_rule=", ".join(" ".join(["b", *own]) for own in others) + " -> b",
        need_replication_factors=tuple(itertools.chain(*others)),
    )
    return differentiable(partitioned, plain)(*leaves)


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
