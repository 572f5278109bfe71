"""Arrays of a given type: on meshes, where they differ between devices is part of it.

On explicit axes of a mesh that is their sharding. On manual axes, inside ``shard_map``, it is the
axes over which they vary; what does not is the same on all of these devices.
"""

from typing import Any

import jax
import jax.numpy as jnp


def typed_as(array: jax.Array, kind: Any) -> jax.Array:
    """The array in the dtype of ``kind`` and, where that is on a mesh, sharded like it."""
    array = varying_as(array.astype(kind.dtype), kind)
    sharding = kind.sharding
    if sharding is None or sharding.mesh.empty or jax.typeof(array).sharding.spec == sharding.spec:
        return array
    return jax.sharding.reshard(array, sharding)


def cotangent_as(array: jax.Array, kind: Any) -> jax.Array:
    """The same for a cotangent: what is the same on several devices gets the sum of theirs."""
    others = varying(jax.typeof(array)) - varying(kind)
    return typed_as(jax.lax.psum(array, tuple(sorted(others))) if others else array, kind)


def varying_as(array: jax.Array, kind: Any) -> jax.Array:
    """The array as one that varies over all manual axes that ``kind`` varies over."""
    missing = varying(kind) - varying(jax.typeof(array))
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def varying(kind: Any) -> frozenset[str]:
    """The manual axes over which arrays of a type vary, as far as ``shard_map`` checks it."""
    found = getattr(kind, "manual_axis_type", None)
    return frozenset() if found is None else frozenset(found.varying)


def zeros_of(like: Any) -> jax.Array:
    """Zeros of the type of an array. ``jnp.zeros_like`` leaves out shardings from JAX 0.12 on."""
    return typed_as(jnp.zeros_like(like), jax.typeof(like))
