"""Mixtures of domains, by hand and where the best one is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import value_grad_and_dots
from ghostjax.selection import mixture

NAN, INF = np.nan, np.inf


def mixture_of_numpy(values, prior, rate, smoothing):
    values, prior = np.asarray(values, np.float64), np.asarray(prior, np.float64)
    prior, known = prior / prior.sum(), ~np.isnan(values)
    grown = prior * np.exp(rate * np.where(known, values - np.nanmax(values), 0))
    weights = np.where(known, grown * prior[known].sum() / grown[known].sum(), prior)
    return (1 - smoothing) * weights + smoothing / len(values)


@pytest.mark.parametrize("smoothing", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    ("values", "prior", "rate"),
    [
        ([1.0, -2.0, 0.5], [1, 1, 1], 1.0),
        ([1.0, -2.0, 0.5], [5, 1, 2], 3.0),
        ([1000.0, 999.0], [0.1, 0.9], 1.0),
        ([NAN, 1.0, 0.0, NAN], [1, 2, 3, 4], 2.0),
        ([0.0, -INF], [1, 1], 1.0),
        ([7.0], [3], 1.0),
    ],
    ids=["equal", "prior", "large", "nan", "infinite", "single"],
)
def test_mixture(values, prior, rate, smoothing):
    expected = mixture_of_numpy(values, prior, rate, smoothing)
    values, prior = jnp.array(values), jnp.array(prior, jnp.float32)
    for fn in (mixture, jax.jit(mixture, static_argnames="smoothing")):
        found = fn(values, prior, rate=rate, smoothing=smoothing)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)


def test_domains_without_a_value_keep_their_shares():
    found = mixture(jnp.full(2, NAN), jnp.array([1.0, 3.0]), smoothing=0.0)
    np.testing.assert_allclose(found, [0.25, 0.75])


def test_steps_add_up():
    first, second = jnp.array([0.3, -1.0, 0.0]), jnp.array([1.0, 0.5, -0.2])
    twice = mixture(second, mixture(first, smoothing=0.0), smoothing=0.0)
    np.testing.assert_allclose(twice, mixture(first + second, smoothing=0.0), rtol=1e-6)


def test_no_gradient_flows_through_a_mixture():
    assert not jax.grad(lambda values: mixture(values)[0])(jnp.array([1.0, 2.0])).any()


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.ones((2, 2), np.float32), {}, r"values must be floating point \[D\], got float32\(2,"),
        (np.arange(2), {}, r"values must be floating point \[D\], got int"),
        (np.ones(2), {"prior": np.ones(3)}, r"one share for each of 2 domains, got \[3\]"),
        (np.ones(2), {"prior": np.array([1.0, 0.0])}, "prior must be positive, got"),
        (np.ones(2), {"rate": -1.0}, "rate must be positive, got -1.0"),
        (np.ones(2), {"rate": NAN}, "rate must be positive, got nan"),
        (np.ones(2), {"smoothing": 1.5}, "smoothing must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments(values, options, message):
    with pytest.raises(ValueError, match=message):
        mixture(jnp.asarray(values), **options)


def test_the_best_mixture_of_quadratic_losses_is_found():
    """Rows of domain d pull to corner d of a simplex, and validation to a mean of the corners: the
    mixture whose training ends there is that mean's coordinates."""
    best, rows, rate = jnp.array([0.5, 0.3, 0.15, 0.05]), 16, 0.05
    target = best[None]
    domains = jnp.arange(rows) % 4
    corners = jnp.eye(4)[domains]

    def losses(params, rows):
        return jnp.sum(jnp.square(params[None] - rows), axis=1) / 2

    def step(carry, _):
        params, weights = carry
        share = 4 * weights[domains]
        direction = rate * jax.grad(lambda params: losses(params, target).mean())(params)
        result = value_grad_and_dots(lambda params, rows: losses(params, rows).mean())(
            params, corners, direction=direction, labels=domains, num_labels=4
        )
        weights = mixture(result.total() / (rows / 4), weights, smoothing=0.0)
        grads = jax.grad(lambda params: jnp.mean(share * losses(params, corners)))(params)
        return (params - rate * grads, weights), None

    start = jnp.zeros(4), jnp.full(4, 0.25)
    (params, weights), _ = jax.jit(lambda start: jax.lax.scan(step, start, length=2000))(start)
    np.testing.assert_allclose(weights, best, atol=0.01)
    np.testing.assert_allclose(params, best, atol=0.01)
