"""Row weights from scores: what to do with values while training goes on.

    weights = f(scores [B]) -> [B] float32, >= 0, with mean 1 over the batch

so that the mean of ``weights * row losses`` keeps the size of an ordinary mean loss, and learning
rates need no change. Where no row is kept, all weights are 0. They are constants: no gradient flows
through them into the scores.

A weight of 0 does not silence a row whose loss is NaN, as 0 * NaN is NaN: take such rows out.
"""

import jax
import jax.numpy as jnp


def drop_negative(scores: jax.Array) -> jax.Array:
    """Weight 0 for rows that hurt, the others alike.

        weights[i] = B * [scores[i] >= 0] / #kept

    Args:
      scores: [B].

    Returns:
      [B] float32; NaN scores are dropped.

    >>> import jax.numpy as jnp
    >>> drop_negative(jnp.array([0.5, -1.0, 2.0, -0.1]))
    Array([2., 0., 2., 0.], dtype=float32)
    """
    return _mean_one(_checked(scores) >= 0)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """The k rows with the largest scores alike, weight 0 for the others.

    Args:
      scores: [B]. Of equal scores, the first rows are kept; NaN scores are dropped, also where
        fewer than k are left.
      k: static, 1 <= k <= B.

    Returns:
      [B] float32.

    Raises:
      ValueError: k does not fit.

    >>> import jax.numpy as jnp
    >>> top_k(jnp.array([0.5, -1.0, 2.0, -0.1]), 1)
    Array([0., 0., 4., 0.], dtype=float32)
    """
    scores = _checked(scores)
    if not 1 <= k <= scores.shape[0]:
        raise ValueError(f"k must be from 1 to the number of rows, {scores.shape[0]}, got {k}.")
    places = jnp.argsort(-scores, stable=True)[:k]  # NaN last
    return _mean_one(jnp.zeros(scores.shape, bool).at[places].set(True) & ~jnp.isnan(scores))


def softmax(scores: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Weights that grow with the score, by its size in standard deviations of the batch.

        weights = B * softmax(scores / (temperature * std(scores)))

    Args:
      scores: [B]. Rows whose score is NaN or infinite are dropped.
      temperature: > 0. Large: all rows alike; small: the best row alone.

    Returns:
      [B] float32. Rows with equal scores get equal weights.

    Raises:
      ValueError: temperature is not positive.

    >>> import jax.numpy as jnp
    >>> softmax(jnp.array([1.0, 1.0]))
    Array([1., 1.], dtype=float32)
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    scores = _checked(scores)
    is_finite = jnp.isfinite(scores)
    scores = jnp.where(is_finite, scores, 0)
    # Scores can be so small that their squares are zero in float32.
    largest = jnp.max(jnp.abs(scores))
    scores = scores / jnp.where(largest > 0, largest, 1)
    spread = jnp.std(scores, where=is_finite)
    scaled = scores / jnp.where(spread > 0, temperature * spread, 1)
    weights = scores.shape[0] * jax.nn.softmax(scaled, where=is_finite)
    return jnp.where(is_finite, weights, 0)


def _checked(scores: jax.Array) -> jax.Array:
    scores = jnp.asarray(scores)
    if scores.ndim != 1 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be floating point [B], got {scores.dtype}{scores.shape}.")
    return jax.lax.stop_gradient(scores.astype(jnp.float32))


def _mean_one(kept: jax.Array) -> jax.Array:
    kept = kept.astype(jnp.float32)
    return kept * (kept.shape[0] / jnp.maximum(kept.sum(), 1))
