"""aggregate: what all trees of dots come to."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from ghostjax._dtypes import wide_dtype


def aggregate(dots: Any) -> jax.Array:
    """Sums a tree of per-row inner products over its parameters.

    ``total[i] = sum_p dots[p][i]``: where ``dots[p][i] = <g_i[p], v[p]>``, the result is
    ``<g_i, v>`` over all parameters.

    Args:
      dots: tree whose leaves are all [B] and floating point.

    Returns:
      [B], float32 (float64 if a leaf is).

    Raises:
      ValueError: ``dots`` has no leaves.
      AssertionError: a leaf is not one-dimensional, or lengths differ (checked with chex).

    >>> import jax.numpy as jnp
    >>> aggregate({"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5, -2.0])})
    Array([1.5, 0. ], dtype=float32)
    """
    leaves = jax.tree_util.tree_leaves(dots)
    if not leaves:
        raise ValueError("dots has no leaves: expected a tree of [B] arrays.")
    chex.assert_rank(leaves, 1)
    chex.assert_equal_shape(leaves)
    chex.assert_type(leaves, float)
    dtype = wide_dtype(*leaves)
    return jnp.sum(jnp.stack([jnp.asarray(leaf, dtype) for leaf in leaves]), axis=0)
