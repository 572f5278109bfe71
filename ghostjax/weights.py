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
    scores = _checked(scores)
    return _mean_one((_as_integers(scores) >= 0) & ~jnp.isnan(scores))


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
    is_number = ~jnp.isnan(scores)
    last = jnp.iinfo(jnp.int32).max
    places = jnp.argsort(jnp.where(is_number, -_as_integers(scores), last), stable=True)[:k]
    return _mean_one(jnp.zeros(scores.shape, bool).at[places].set(True) & is_number)


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
    # Differences of large scores overflow, and the squares of small ones are zero.
    scores = _of_size_one(jnp.where(is_finite, scores, 0))
    best = jnp.max(scores, where=is_finite, initial=-1)
    # Differences first: they are exact where they are small, quotients would be rounded.
    below = jnp.where(is_finite, scores - best, 0)
    count = jnp.maximum(jnp.sum(is_finite, dtype=jnp.float32), 1)
    centred = jnp.where(is_finite, below - jnp.sum(below) / count, 0)
    spread = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
    divisor = jnp.maximum(temperature * spread, 1e-30)  # smaller ones lose all rows but the best
    weights = jnp.where(is_finite, jnp.exp(below / divisor), 0)
    return weights * (weights.shape[0] / jnp.maximum(jnp.sum(weights), 1))


def _checked(scores: jax.Array) -> jax.Array:
    scores = jnp.asarray(scores)
    if scores.ndim != 1 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be floating point [B], got {scores.dtype}{scores.shape}.")
    return jax.lax.stop_gradient(scores.astype(jnp.float32))


def _as_integers(scores: jax.Array) -> jax.Array:
    """[B] int32 in the order of the scores, 0 for 0.

    A number below 2^-126, which processors may take for 0, is not 0 here but itself over 2^-149.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, -(bits & jnp.iinfo(jnp.int32).max), bits)


def _of_size_one(scores: jax.Array) -> jax.Array:
    """[B] finite scores over the largest of their sizes; zeros stay."""
    integers = _as_integers(scores)
    is_lost = jnp.abs(integers) < 2**23
    raised = jnp.where(is_lost, integers.astype(jnp.float32) * 2.0**-85, scores * 2.0**64)
    # XLA multiplies by the reciprocal, which is itself lost for a size above 2^126.
    size = jnp.max(jnp.abs(scores))
    scores = jnp.where(size < 2.0**-64, raised, scores * jnp.where(size > 2.0**64, 2.0**-64, 1))
    size = jnp.max(jnp.abs(scores))
    return scores / jnp.where(size > 0, size, 1)


def _mean_one(kept: jax.Array) -> jax.Array:
    kept = kept.astype(jnp.float32)
    return kept * (kept.shape[0] / jnp.maximum(kept.sum(), 1))
