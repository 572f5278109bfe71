"""Rows on meshes with explicit axes, where what is sorted or taken must say how it is split."""

import math

import jax
from jax.sharding import PartitionSpec


def whole(array: jax.Array) -> jax.Array:
    """The array on every device, where explicit axes of a mesh split it."""
    sharding = jax.typeof(array).sharding
    if all(names is None for names in sharding.spec):
        return array
    return jax.sharding.reshard(array, sharding.update(spec=PartitionSpec()))


def taken(leaf: jax.Array, places: jax.Array) -> jax.Array:
    """``leaf[places]``, split over explicit axes of a mesh like ``leaf`` as far as rows suffice."""
    sharding = jax.typeof(leaf).sharding
    rows, *others = sharding.spec
    if rows is None:
        return leaf[places]
    names = (rows,) if isinstance(rows, str) else rows
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    rows = rows if places.size % devices == 0 else None
    return leaf.at[places].get(out_sharding=sharding.update(spec=PartitionSpec(rows, *others)))
