"""Arrays that models, their batches and directions are made of: drawn, the same every time."""

import jax
import jax.numpy as jnp
import numpy as np

ROWS, POSITIONS, FEATURES = 6, 6, 5  # T = B: no axis is told by its size
K = 3


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def activations(seed=1):
    return draw(ROWS, POSITIONS, FEATURES, seed=seed)


def direction_like(params):
    generator = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), params
    )


def directions_like(params, count=K):
    """Stacked."""
    generator = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=(count, *leaf.shape)), leaf.dtype), params
    )


def mean_squares(outputs):
    return jnp.mean(jnp.square(outputs).reshape(outputs.shape[0], -1), axis=1)
