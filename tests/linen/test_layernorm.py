"""LayerNorm's dot products as a plain function, against hand-computed numbers and autodiff."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine, testing
from ghostjax.linen import layernorm_dot_products

SHAPES = {"rank_2": (7, 6), "rank_3": (7, 5, 6), "rank_4": (7, 3, 2, 6)}


def draw(shape, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    return tuple(jnp.asarray(generator.normal(size=shape), dtype) for _ in range(2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("val_rows", [1, 2, 3])
def test_is_the_inner_product_of_summed_gradients(shape, val_rows):
    normalized, cotangents = draw(shape)
    dots = layernorm_dot_products(normalized, cotangents, val_rows)
    x, g = (np.asarray(array, np.float64).reshape(7, -1, 6) for array in (normalized, cotangents))
    for name, rows in {"scale": (g * x).sum(1), "bias": g.sum(1)}.items():
        assert dots[name].shape == (7 - val_rows,)
        assert dots[name].dtype == jnp.float32
        expected = rows[: 7 - val_rows] @ rows[7 - val_rows :].sum(0)
        np.testing.assert_allclose(dots[name], expected, rtol=1e-5, atol=1e-5)


def test_against_autodiff_of_a_layernorm():
    x, weights = draw((6, 4, 8))
    scale, bias = jnp.linspace(0.5, 2, 8), jnp.linspace(-1, 1, 8)
    bare = nn.LayerNorm(use_bias=False, use_scale=False)

    def losses(scale, bias):
        normalized = bare.apply({}, x)
        outputs = normalized * scale[None, None] + bias[None, None]
        return jnp.sum(jnp.sin(outputs) * weights, axis=(1, 2))

    per_scale, per_bias = jax.jacrev(losses, argnums=(0, 1))(scale, bias)
    normalized = bare.apply({}, x)
    cotangents = jnp.cos(normalized * scale[None, None] + bias[None, None]) * weights
    dots = layernorm_dot_products(normalized, cotangents, 2)
    np.testing.assert_allclose(dots["scale"], per_scale[:4] @ per_scale[4:].sum(0), rtol=1e-4)
    np.testing.assert_allclose(dots["bias"], per_bias[:4] @ per_bias[4:].sum(0), rtol=1e-4)


def test_summing_factors_before_multiplying_would_differ():
    """Validation rows enter as a sum of products, which V = 1 could not tell apart."""
    normalized, cotangents = draw((4, 3, 5))
    dots = layernorm_dot_products(normalized, cotangents, 2)
    cross = (cotangents[2:].sum(0) * normalized[2:].sum(0)).sum(0)
    wrong = jnp.einsum("btf,btf,f->b", cotangents[:2], normalized[:2], cross)
    assert np.abs(dots["scale"] - wrong).max() > 0.1


def test_bfloat16_is_accumulated_in_float32():
    """4096 equal terms: a bfloat16 sum would stop growing at 256."""
    normalized = jnp.ones((3, 4096, 2), jnp.bfloat16)
    dots = layernorm_dot_products(normalized, normalized, 1)
    assert dots["scale"].dtype == dots["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(dots["scale"], [2 * 4096.0**2] * 2)
    np.testing.assert_array_equal(dots["bias"], [2 * 4096.0**2] * 2)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        normalized, cotangents = draw((5, 3), np.float64)
        dots = layernorm_dot_products(normalized, cotangents, 2)
        assert dots["scale"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("val_rows", "message"),
    [
        (0, "val_batch_size must be at least 1"),
        (-1, "val_batch_size must be at least 1"),
        (7, "val_batch_size=7 for a batch of 7 rows"),
        (8, "val_batch_size=8 for a batch of 7 rows"),
    ],
)
def test_val_batch_size_that_does_not_fit(val_rows, message):
    with pytest.raises(ValueError, match=message):
        layernorm_dot_products(*draw((7, 6)), val_rows)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one shape \[N, ..., F\].*\(4, 3\) and \(4, 2\)"):
        layernorm_dot_products(jnp.ones((4, 3)), jnp.ones((4, 2)), 1)
    with pytest.raises(ValueError, match="rank 2 or more"):
        layernorm_dot_products(jnp.ones(4), jnp.ones(4), 1)


class Net(nn.Module):
    """The specified synthetic case: a LayerNorm net with a Linear head."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x)
        x = nn.LayerNorm()(nn.relu(nn.Dense(16)(x)))
        return nn.Dense(4)(x)


@pytest.mark.parametrize("shape", [(12, 8), (12, 5, 8)], ids=["rank_2", "rank_3"])
def test_aggregation_over_layernorm_and_linear(shape):
    """Absolute error of the total below 5e-4."""
    x, _ = draw(shape)
    params = Net().init(jax.random.key(0), x)["params"]

    def loss_fn(params, batch):
        outputs = Net().apply({"params": params}, batch)
        return jnp.mean(jnp.square(outputs - 1.0).reshape(len(batch), -1), axis=1)

    engine = GradDotProdEngine(loss_fn, val_batch_size=4)
    result = engine(params, x)
    expected = testing.per_example_dots(loss_fn, params, x, 4)
    total = engine.aggregate(result.dots)
    assert total.shape == (8,)
    np.testing.assert_allclose(total, sum(jax.tree.leaves(expected)), rtol=0, atol=5e-4)
    np.testing.assert_array_equal(total, result.total())
    for name in ("LayerNorm_0", "LayerNorm_1"):
        for parameter in ("scale", "bias"):
            leaf = result.dots[name][parameter]
            assert leaf.shape == (8,)
            np.testing.assert_allclose(leaf, expected[name][parameter], rtol=0, atol=5e-4)
