"""Choosing rows: greedy on a Gram matrix, by chance, and their numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax.selection import greedy, rows, sample, softmax, top_k

NAN, INF = np.nan, np.inf


def greedy_of_numpy(scores, gram, k, interaction):
    """Numbers of the rows in the order of their being picked."""
    picked = []
    for _ in range(k):
        best = None
        for i in set(range(len(scores))) - set(picked):
            gain = scores[i] - interaction * sum(gram[i][j] for j in picked)
            if not np.isnan(gain) and (best is None or gain > best[0] or gain == best[0] > i):
                best = gain, i
        if best is None:
            break
        picked.append(best[1])
    return picked


def as_weights(picked, count):
    weights = np.zeros(count, np.float32)
    weights[picked] = count / max(len(picked), 1)
    return weights


@pytest.mark.parametrize("interaction", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_greedy_as_written_in_numpy(k, interaction):
    generator = np.random.default_rng(k)
    fn = jax.jit(greedy, static_argnums=2)
    for _ in range(20):
        gradients = generator.normal(size=(7, 3))
        scores, gram = np.float32(gradients @ gradients[0]), np.float32(gradients @ gradients.T)
        picked = greedy_of_numpy(scores, gram, k, interaction)
        np.testing.assert_array_equal(
            fn(jnp.array(scores), jnp.array(gram), k, interaction), as_weights(picked, 7)
        )


def test_greedy_minimizes_the_quadratic_of_orthogonal_or_equal_gradients():
    """Where gradients are orthogonal or equal, picking one by one finds the best of all sets."""
    gradients = np.float32([[2, 0, 0], [2, 0, 0], [2, 0, 0], [0, 1.5, 0], [0, 0, 1.5], [0, 0, -1]])
    target, k, step = np.float32([3, 2, 1]), 3, 0.5
    gram, scores = gradients @ gradients.T, gradients @ target
    half = step / k * np.diag(gram) / 2

    def decrease(subset):
        moved = step / k * gradients[list(subset)].sum(0)
        return moved @ target - moved @ moved / 2

    best = max(itertools.combinations(range(6), k), key=decrease)
    found = greedy(jnp.array(scores - half), jnp.array(gram), k, step / k)
    np.testing.assert_allclose(decrease(np.flatnonzero(found)), decrease(best), rtol=1e-6)


@pytest.mark.slow
def test_greedy_without_interaction_is_top_k():
    scores = jnp.array([0.0, 3.0, NAN, 3.0, -1.0, INF, 1e-45])
    gram = jnp.full((7, 7), INF)
    for k in range(1, 8):
        np.testing.assert_array_equal(greedy(scores, gram, k, 0.0), top_k(scores, k))


def test_greedy_never_picks_a_nan():
    gram = jnp.eye(4).at[0, 1].set(NAN).at[1, 0].set(NAN)
    np.testing.assert_array_equal(greedy(jnp.array([3.0, 2.9, NAN, 0.1]), gram, 2), [2, 0, 0, 2])
    np.testing.assert_array_equal(greedy(jnp.array([3.0, 2.9, NAN, 0.1]), gram, 4), [2, 0, 0, 2])
    np.testing.assert_array_equal(greedy(jnp.full(4, NAN), gram, 2), np.zeros(4))


def test_gram_must_fit():
    with pytest.raises(ValueError, match=r"gram must be floating point \[B, B\] for 3 scores, got"):
        greedy(jnp.ones(3), jnp.ones((3, 2)), 1)
    with pytest.raises(ValueError, match=r"got int32\(3, 3\)"):
        greedy(jnp.ones(3), jnp.ones((3, 3), jnp.int32), 1)


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores, k: greedy(scores, jnp.eye(3), k),
        lambda scores, k: sample(scores, k, jax.random.key(0)),
        rows,
    ],
    ids=["greedy", "sample", "rows"],
)
@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(choose, k):
    with pytest.raises(ValueError, match=rf"k must be from 1 to the number of rows, 3, got {k}\."):
        choose(jnp.ones(3), k)


@pytest.mark.slow
def test_sample_draws_with_the_probabilities_of_softmax():
    scores = jnp.array([1.0, 0.0, 2.0, NAN, -1.0, INF])
    keys = jax.random.split(jax.random.key(0), 20_000)
    first = jax.jit(jax.vmap(lambda key: sample(scores, 1, key, 0.7)))(keys)
    expected = softmax(scores, 0.7)
    # Of 20,000 draws, the standard deviation of a mean weight is 6 * 0.5 / 141 at most.
    np.testing.assert_allclose(first.mean(0), expected, atol=4 * 0.022)
    two = jax.jit(jax.vmap(lambda key: sample(scores, 2, key, 0.7)))(keys)
    p = np.asarray(expected, np.float64) / 6
    both = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]
    np.testing.assert_allclose((two > 0).mean(0), both, atol=4 * 0.004)


@pytest.mark.slow
def test_sample_never_draws_what_is_not_finite():
    scores = jnp.array([NAN, 1.0, INF, -INF])
    np.testing.assert_array_equal(sample(scores, 3, jax.random.key(0)), [0, 4, 0, 0])


def test_temperature_of_sample_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        sample(jnp.ones(2), 1, jax.random.key(0), 0)


@pytest.mark.parametrize(
    ("weights", "k", "expected"),
    [
        ([0.0, 2.0, 0.0, 2.0], 2, [1, 3]),
        ([0.0, 2.0, 0.0, 2.0], 4, [1, 3, -1, -1]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.5, 1.0, 1.5, 1.0], 3, [1, 2, 3]),
        ([NAN, 1.0, -1.0, INF], 3, [1, 3, -1]),
        ([0.0, -0.0], 1, [-1]),
        ([1e-45, 0.0], 2, [0, -1]),
    ],
)
def test_rows(weights, k, expected):
    found = jax.jit(rows, static_argnums=1)(jnp.array(weights), k)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


def test_weights_must_be_floats():
    with pytest.raises(ValueError, match=r"weights must be floating point \[B\], got int32"):
        rows(jnp.arange(3), 1)
