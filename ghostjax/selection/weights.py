"""Row weights from scores: which rows to train on, and how much.

    weights = f(scores [B]) -> [B] float32, >= 0, with mean 1 over the batch

so that the mean of ``weights * row losses`` keeps the size of an ordinary mean loss, and learning
rates need no change. Where no row is kept, all weights are 0. They are constants: no gradient flows
through them into the scores.

A weight of 0 does not silence a row whose loss is NaN, as 0 * NaN is NaN: take such rows out, as
``rows`` does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax.selection.meshes import whole


def threshold(scores: jax.Array, least: Any = 0.0) -> jax.Array:
    """Weight 0 for rows below a score, the others alike; by default for rows that hurt.

        weights[i] = B * [scores[i] >= least] / #kept

    Args:
      scores: [B].
      least: scalar, may be traced; a NaN keeps no row.

    Returns:
      [B] float32; NaN scores are dropped.

    >>> import jax.numpy as jnp
    >>> threshold(jnp.array([0.5, -1.0, 2.0, -0.1]))
    Array([2., 0., 2., 0.], dtype=float32)
    """
    scores, least = _checked(scores), jnp.asarray(least, jnp.float32)
    is_number = ~(jnp.isnan(scores) | jnp.isnan(least))
    return _mean_one((_as_integers(scores) >= _as_integers(least)) & is_number)


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
    check_k(k, scores.shape[0])
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
    exponents = _exponents(_checked(scores), temperature)
    weights = jnp.exp(exponents)
    return weights * (weights.shape[0] / jnp.maximum(jnp.sum(weights), 1))


def sample(scores: jax.Array, k: int, key: jax.Array, temperature: float = 1.0) -> jax.Array:
    """k rows alike, drawn without replacement with the probabilities that ``softmax`` gives.

        weights = top_k(scores / (temperature * std(scores)) + Gumbel noise, k)

    The first row is drawn with probability softmax(...)[i], the next from those left, and so on:
    Boltzmann selection, which leaves rows of middling scores a chance.

    Args:
      scores: [B]. Rows whose score is NaN or infinite are never drawn.
      k: static, 1 <= k <= B.
      key: of ``jax.random.key``.
      temperature: > 0. Large: any k rows; small: those with the largest scores.

    Returns:
      [B] float32.

    Raises:
      ValueError: k does not fit, or temperature is not positive.

    >>> import jax, jax.numpy as jnp
    >>> sample(jnp.array([0.0, 9.0, 0.0, 8.0]), 2, jax.random.key(0), temperature=0.01)
    Array([0., 2., 0., 2.], dtype=float32)

    Source: Kool et al., Stochastic Beams and Where to Find Them, arXiv:1903.06059, section 2.3.
    """
    exponents = _exponents(_checked(scores), temperature)
    noisy = exponents + jax.random.gumbel(key, exponents.shape, exponents.dtype)
    return top_k(jnp.where(jnp.isfinite(exponents), noisy, jnp.nan), k)


def greedy(scores: jax.Array, gram: jax.Array, k: int, interaction: Any = 1.0) -> jax.Array:
    """k rows alike, picked one by one: each is the best beside those that are picked already.

        next = argmax over rows i that are left of
               scores[i] - interaction * sum over picked j of gram[i, j]

    Rows that pull alike are worth less together than apart. With scores <g_i, g_val> and the Gram
    matrix of the rows' gradients, the decrease of the validation loss by a step of SGD on the mean
    of k rows is, to second order and with the Hessian taken to be c times the identity,

        lr / k * (sum_i <g_i, g_val> - c * lr / (2 k) * |sum_i g_i|^2)

    so that ``interaction`` is ``c * lr / k``. The row's own |g_i|^2 / 2 is left out, as in GREATS:
    subtract ``interaction * jnp.diagonal(gram) / 2`` from the scores to have it in.

    Args:
      scores: [B]. Of equal ones, the first row is picked.
      gram: [B, B], such as the sum over parameters of what ``pairwise_dots`` gives.
      k: static, 1 <= k <= B.
      interaction: scalar, may be traced; 0 is ``top_k``.

    Returns:
      [B] float32. A row whose score is NaN is never picked; nor is one that has a NaN with a picked
      row in ``gram``. Where fewer than k are left, fewer are kept.

    Raises:
      ValueError: k or a shape does not fit.

    >>> import jax.numpy as jnp
    >>> gram = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> greedy(jnp.array([3.0, 2.9, 2.0]), gram, 2)
    Array([1.5, 0. , 1.5], dtype=float32)

    Source: GREATS, Wang et al., NeurIPS 2024 (openreview.net/forum?id=232VcN8tSx).
    """
    scores = _checked(scores)
    check_k(k, scores.shape[0])
    gram = jnp.asarray(gram)
    if gram.shape != 2 * scores.shape or not jnp.issubdtype(gram.dtype, jnp.floating):
        raise ValueError(
            f"gram must be floating point [B, B] for {scores.shape[0]} scores, got "
            f"{gram.dtype}{gram.shape}."
        )
    gram = jax.lax.stop_gradient(whole(gram).astype(jnp.float32))
    interaction = jnp.asarray(interaction, jnp.float32)
    lowest = jnp.iinfo(jnp.int32).min

    def pick(_, carry):
        kept, left = carry
        is_left = ~(kept | jnp.isnan(left))
        place = jnp.argmax(jnp.where(is_left, _as_integers(left), lowest))
        is_any = jnp.any(is_left)
        taken = jnp.where(is_any & (interaction != 0), interaction * gram[:, place], 0)
        # Subtracting 0 would make numbers below 2^-126 zero.
        left = jnp.where(taken == 0, left, left - taken)
        return kept.at[place].set(kept[place] | is_any), left

    kept, _ = jax.lax.fori_loop(0, k, pick, (jnp.zeros(scores.shape, bool), scores))
    return _mean_one(kept)


def rows(weights: jax.Array, k: int) -> jax.Array:
    """The numbers of the k rows with the largest weights, to take them out of the batch.

    Args:
      weights: [B]. Of equal ones, the first rows are taken; rows of weight 0 or NaN never are.
      k: static, 1 <= k <= B.

    Returns:
      [k] int32, ascending; -1 at the end where fewer rows have a weight.

    Raises:
      ValueError: k does not fit.

    >>> import jax.numpy as jnp
    >>> rows(jnp.array([0.0, 2.0, 0.0, 2.0]), 3)
    Array([ 1,  3, -1], dtype=int32)
    """
    weights = _checked(weights, "weights")
    is_taken = top_k(jnp.where(_as_integers(weights) > 0, weights, jnp.nan), k) > 0
    return jnp.flatnonzero(is_taken, size=k, fill_value=-1).astype(jnp.int32)


def check_k(k: int, count: int) -> None:
    if not isinstance(k, int | np.integer):
        raise TypeError(
            f"k must be a Python int (it is a static shape), got {k!r} of type {type(k).__name__}."
        )
    if not 1 <= k <= count:
        raise ValueError(f"k must be from 1 to the number of rows, {count}, got {k}.")


def _exponents(scores: jax.Array, temperature: float) -> jax.Array:
    """(scores - the largest) / (temperature * std(scores)); -inf for what is not finite."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    is_finite = jnp.isfinite(scores)
    # Differences of large scores overflow, and the squares of small ones are zero.
    scores = of_size_one(jnp.where(is_finite, scores, 0))
    best = jnp.max(scores, where=is_finite, initial=-1)
    # Differences first: they are exact where they are small, quotients would be rounded.
    below = jnp.where(is_finite, scores - best, 0)
    count = jnp.maximum(jnp.sum(is_finite, dtype=jnp.float32), 1)
    centred = jnp.where(is_finite, below - jnp.sum(below) / count, 0)
    spread = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
    divisor = jnp.maximum(temperature * spread, 1e-30)  # smaller ones lose all rows but the best
    return jnp.where(is_finite, below / divisor, -jnp.inf)


def _checked(scores: jax.Array, name: str = "scores") -> jax.Array:
    scores = jnp.asarray(scores)
    if scores.ndim != 1 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point [B], got {scores.dtype}{scores.shape}.")
    return jax.lax.stop_gradient(whole(scores).astype(jnp.float32))


def _as_integers(scores: jax.Array) -> jax.Array:
    """int32 in the order of the scores, 0 for 0.

    A number below 2^-126, which processors may take for 0, is not 0 here but itself over 2^-149.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, -(bits & jnp.iinfo(jnp.int32).max), bits)


def of_size_one(scores: jax.Array) -> jax.Array:
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
