"""Arrays of a given type: on meshes with explicit axes, shardings are part of it."""

from typing import Any

import jax
import jax.numpy as jnp


def typed_as(array: jax.Array, kind: Any) -> jax.Array:
    """The array in the dtype of ``kind`` and, where that is on a mesh, sharded like it."""
    array = array.astype(kind.dtype)
    sharding = kind.sharding
    if sharding is None or sharding.mesh.empty or jax.typeof(array).sharding.spec == sharding.spec:
        return array
    return jax.sharding.reshard(array, sharding)


def zeros_of(like: Any) -> jax.Array:
    """Zeros of the type of an array. ``jnp.zeros_like`` leaves out shardings from JAX 0.12 on."""
    return typed_as(jnp.zeros_like(like), jax.typeof(like))
