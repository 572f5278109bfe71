"""Arrays of a given type: on meshes, where they differ between devices is part of it.

On explicit axes of a mesh that is their sharding. On manual axes, inside ``shard_map``, it is the
axes over which they vary; what does not is the same on all of these devices.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def typed_as(array: jax.Array, kind: Any) -> jax.Array:
    """The array in the dtype of ``kind`` and, where that is on a mesh, sharded like it."""
    with on_mesh_of(jax.typeof(array)):
        array = varying_as(array.astype(kind.dtype), kind)
    own, sharding = jax.typeof(array).sharding, kind.sharding
    if sharding is None or sharding.mesh.empty:
        return array
    if (own.spec, own.mesh.axis_types) == (sharding.spec, sharding.mesh.axis_types):
        return array
    with on_mesh_of(kind):
        return jax.sharding.reshard(array, sharding)


def on_mesh_of(kind: Any) -> contextlib.AbstractContextManager[None]:
    """Where arrays of that type are computed with: some axes may be explicit elsewhere only."""
    if kind.sharding is None or kind.sharding.mesh.empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(kind.sharding.mesh)


def cotangent_as(array: jax.Array, kind: Any) -> jax.Array:
    """The same for a cotangent: what is the same on several devices gets the sum of theirs."""
    return typed_as(added_up(array, kind), kind)


def added_up(array: jax.Array, kind: Any) -> jax.Array:
    """The sum over those devices on which arrays of type ``kind`` are the same."""
    others = varying(jax.typeof(array)) - varying(kind)
    return jax.lax.psum(array, tuple(sorted(others))) if others else array


def varying_as(array: jax.Array, kind: Any) -> jax.Array:
    """The array as one that varies over all manual axes that ``kind`` varies over."""
    missing = varying(kind) - varying(jax.typeof(array))
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def varying(kind: Any) -> frozenset[str]:
    """The manual axes over which arrays of a type vary, as far as ``shard_map`` checks it."""
    found = getattr(kind, "manual_axis_type", None)
    return frozenset() if found is None else frozenset(found.varying)


def on_this_mesh(tree: Any) -> Any:
    """Arrays that come from where other axes of the mesh are explicit."""
    mesh = jax.sharding.get_abstract_mesh()

    def moved(array):
        own = jax.typeof(array).sharding.mesh
        if mesh.empty or own.empty or own.axis_types == mesh.axis_types:
            return array
        return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(moved, tree)


def in_context(context: Any, function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of trees of arrays, where axes of the mesh may differ; its result as here."""
    with context:
        found = function(*on_this_mesh(trees))
    return on_this_mesh(found)


def zeros_of(like: Any) -> jax.Array:
    """Zeros of the type of an array. ``jnp.zeros_like`` leaves out shardings from JAX 0.12 on."""
    return zeros_of_type(jax.typeof(like))


def zeros_of_type(kind: Any) -> jax.Array:
    with on_mesh_of(kind):
        return typed_as(jnp.zeros(kind.shape, kind.dtype), kind)
