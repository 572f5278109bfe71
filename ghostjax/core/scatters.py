"""Numbers of examples scattered as an operation scatters what belongs to them."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from ghostjax.core.place_rules import shape_of
from ghostjax.core.tracks import repeated


def scattered(eqn, ids: Any, updates: Any, operands, reduce: Any) -> Any:
    """``updates`` scattered into ``ids`` as the equation does, by ``reduce`` of ``lax``."""
    dims = eqn.params["dimension_numbers"]
    whole, part = shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    inserted = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    window = [axis for axis in range(len(whole)) if axis not in inserted]
    updated = dict(zip(dims.update_window_dims, window))
    scattered = [axis for axis in range(len(part)) if axis not in updated]
    partial = [axis for own, axis in updated.items() if whole[axis] != part[own]]
    axes = [*inserted, *dims.scatter_dims_to_operand_dims, *partial]
    full = [*axes]
    for own, axis in updated.items():
        if ids.shape[axis] > 1 or updates.shape[own] > 1:
            full.append(axis)
    ids = repeated(ids, whole, full)
    own = [own for own, axis in updated.items() if axis in full]
    updates = repeated(updates, part, [*scattered, *own])
    mode = eqn.params["mode"]
    if mode != lax.GatherScatterMode.CLIP:
        mode = lax.GatherScatterMode.FILL_OR_DROP
    return reduce(
        jnp.asarray(ids, jnp.int32), operands[1], jnp.asarray(updates, jnp.int32), dims, mode=mode
    )
