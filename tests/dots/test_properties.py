"""What must hold of the dots whatever the model: invariances, dtypes, NaN and inf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing, value_grad_and_dots
from models.arrays import FEATURES, ROWS, activations, direction_like, draw
from tests.dots.checks import expected_dots

PARAMS = {"w": draw(FEATURES, FEATURES), "b": draw(FEATURES), "gain": draw(1, FEATURES, seed=2)}
DIRECTION = direction_like(PARAMS)
BATCH = {"x": activations(), "weight": jnp.linspace(0.5, 2.0, ROWS)}


def row_losses(params, batch):
    """Merged axes, a tied weight and a norm; rows are weighted."""
    rows, positions, _ = batch["x"].shape
    h = jnp.tanh(batch["x"].reshape(-1, FEATURES) @ params["w"] + params["b"][None])
    h = h.reshape(rows, positions, FEATURES) + batch["x"]
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True)) * params["gain"][None]
    return jnp.mean(jnp.square(h @ params["w"].T), axis=(1, 2)) * batch["weight"]


def mean_loss(params, batch):
    return jnp.mean(row_losses(params, batch))


FN = value_grad_and_dots(mean_loss)


@jax.jit
def dots_of(params, batch, direction):
    return FN(params, batch, direction=direction).dots


def taken(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def test_linear_in_the_direction():
    other = jax.tree.map(jnp.cos, DIRECTION)
    both = jax.tree.map(lambda v, w: 2 * v - 3 * w, DIRECTION, other)
    apart = jax.tree.map(
        lambda v, w: 2 * v - 3 * w,
        dots_of(PARAMS, BATCH, DIRECTION),
        dots_of(PARAMS, BATCH, other),
    )
    testing.assert_dots_close(dots_of(PARAMS, BATCH, both), apart)


def test_permuted_rows_have_permuted_dots():
    order = np.random.default_rng(0).permutation(ROWS)
    permuted = dots_of(PARAMS, taken(BATCH, order), DIRECTION)
    testing.assert_dots_close(permuted, taken(dots_of(PARAMS, BATCH, DIRECTION), order))


@pytest.mark.parametrize("first", [1, 3])
def test_a_batch_in_two_parts(first):
    parts = [
        dots_of(PARAMS, taken(BATCH, rows), DIRECTION)
        for rows in (slice(None, first), slice(first, None))
    ]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    testing.assert_dots_close(joined, dots_of(PARAMS, BATCH, DIRECTION))


def test_rows_without_weight_have_zero_dots():
    batch = BATCH | {"weight": BATCH["weight"].at[jnp.array([1, 4])].set(0.0)}
    dots = dots_of(PARAMS, batch, DIRECTION)
    kept = np.array([0, 2, 3, 5])
    for leaf in jax.tree.leaves(dots):
        np.testing.assert_array_equal(np.asarray(leaf)[[1, 4]], 0)
    testing.assert_dots_close(taken(dots, kept), taken(dots_of(PARAMS, BATCH, DIRECTION), kept))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    batch = BATCH | {"x": BATCH["x"].at[2, 1, 0].set(bad)}
    dots = dots_of(PARAMS, batch, DIRECTION)
    others = np.array([0, 1, 3, 4, 5])
    for leaf in jax.tree.leaves(dots):
        assert not np.isfinite(leaf[2])
    testing.assert_dots_close(taken(dots, others), taken(dots_of(PARAMS, BATCH, DIRECTION), others))


def test_float64_throughout():
    with jax.enable_x64(True):
        params, batch, direction = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (PARAMS, BATCH, DIRECTION)
        )
        result = jax.jit(FN)(params, batch, direction=direction)
        numbers = result.value, result.grads, result.dots, result.shared
        assert {leaf.dtype for leaf in jax.tree.leaves(numbers)} == {jnp.dtype(jnp.float64)}
        rows = testing.per_example_grads(row_losses, params, batch)
        expected = jax.tree.map(lambda g, v: np.tensordot(g, v, axes=v.ndim), rows, direction)
        testing.assert_dots_close(result.dots, expected, rtol=1e-12)


def test_bfloat16_parameters(standard_promotion):
    """Dots are float32, as near to the rows' own gradients as bfloat16 allows."""

    def half(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    params, batch, direction = half(PARAMS), half(BATCH), half(DIRECTION)
    result = jax.jit(FN)(params, batch, direction=direction)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(result.grads)} == {jnp.dtype(jnp.bfloat16)}
    whole = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (params, batch)]
    testing.assert_dots_close(result.dots, dots_of(*whole, DIRECTION), rtol=5e-2)


def spectral(params, x):
    """Learned complex factors on the Fourier coefficients of each row."""
    factors = params["real"] + 1j * params["imag"]
    return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * factors[None], axis=1)


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, c: (c @ kept[1].swapaxes(0, 1), kept[0].T @ c)
)


def own_rule(params, x):
    return jnp.abs(product(x + 1j * jnp.sin(x), (params["real"] + 1j * params["imag"]).T))


@pytest.mark.parametrize("model", [spectral, own_rule])
def test_complex_values_on_the_way(model, standard_promotion):
    x = draw(ROWS, 8, seed=1) if model is spectral else draw(ROWS, FEATURES, seed=1)
    params = {"real": draw(5), "imag": draw(5, seed=2)}
    if model is own_rule:
        params = jax.tree.map(lambda leaf: jnp.outer(jnp.arange(1.0, 4.0), leaf), params)
    direction = direction_like(params)

    def losses(params, x):
        return jnp.mean(jnp.square(jnp.sin(model(params, x))), axis=1)

    fn = value_grad_and_dots(lambda params, x: jnp.mean(losses(params, x)))
    result = jax.jit(fn)(params, x, direction=direction)
    testing.assert_dots_close(result.dots, expected_dots(losses, params, x, direction))
