"""LayerNorm's dot products as a plain function, and as the engine calls it."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine, testing
from ghostjax.linen import layernorm, layernorm_dot_products
from models.modules.table import activations, perturbed, squared
from tests.linen.checks import check

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


def lifted(wrap):
    """A norm in a network of its own, behind a transform of Flax."""

    class Net(nn.Module):
        norm: object

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.gelu(wrap(self.norm)()(nn.Dense(8)(x))))

    return Net


def scanned(norm):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jnp.tanh(norm()(x)), None

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return stack()(x, None)[0]

    return Layers


NORMS = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "GroupNorm": functools.partial(nn.GroupNorm, num_groups=2),
    "InstanceNorm": nn.InstanceNorm,
}
PLAIN = lifted(lambda norm: norm)
WRAPPED = {
    "plain": PLAIN,
    "remat": lifted(nn.remat),
    "nn_jit": lifted(nn.jit),
    "scan": lifted(scanned),
}


def problem(model, wrap=lambda apply: apply):
    x = activations(7, 5, 6)
    apply = wrap(lambda params, x: model.apply({"params": params}, x))
    return lambda params, x: squared(apply(params, x)), perturbed(model, x), x


@pytest.fixture
def doubled(monkeypatch):
    """``layernorm_dot_products`` returns twice what it should; its calls are listed."""
    calls, original = [], layernorm.layernorm_dot_products

    def twice(normalized, cotangents, val_batch_size):
        calls.append((normalized.shape, cotangents.shape, val_batch_size))
        dots = original(normalized, cotangents, val_batch_size=val_batch_size)
        return jax.tree.map(lambda leaf: 2 * leaf, dots)

    monkeypatch.setattr(layernorm, "layernorm_dot_products", twice)
    return calls


def assert_doubled(loss_fn, params, batch, calls):
    """For the parameters of norms, and for no others."""
    result = GradDotProdEngine(loss_fn, val_batch_size=3)(params, batch)
    assert calls
    assert all(call == (call[0], call[0], 3) for call in calls)
    expected = testing.per_example_dots(loss_fn, params, batch, 3)
    expected = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (2 if "Norm" in jax.tree_util.keystr(path) else 1), expected
    )
    testing.assert_dots_close(result.dots, expected)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_engine_takes_the_dots_of_norms_from_here(norm, doubled):
    assert_doubled(*problem(PLAIN(NORMS[norm])), doubled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remat", "nn_jit", "scan"])
def test_the_engine_takes_them_from_here_inside_transforms(name, doubled):
    assert_doubled(*problem(WRAPPED[name](nn.LayerNorm)), doubled)


def vmapped(apply):
    return jax.vmap(apply, in_axes=(None, 0))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, vmapped])
def test_the_engine_takes_them_from_here_inside_transforms_of_jax(wrap, doubled):
    assert_doubled(*problem(PLAIN(nn.LayerNorm), wrap), doubled)


def test_the_function_is_jitted_in_the_engine():
    loss_fn, params, x = problem(PLAIN(nn.LayerNorm))
    engine = GradDotProdEngine(loss_fn, val_batch_size=3)
    assert "name=layernorm_dot_products" in str(jax.make_jaxpr(engine)(params, x))
    [place] = engine.coverage(params, x)["['LayerNorm_0']['scale']"]
    assert re.fullmatch(rf"ghostjax_LayerNorm_bias_scale at {re.escape(__file__)}:\d+", place)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = nn.LayerNorm()
        return nn.Dense(3)(norm(jnp.tanh(norm(x))))


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        norms = nn.vmap(
            nn.LayerNorm,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=2,
        )
        return norms()(x)


class RowsBehind(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.swapaxes(nn.LayerNorm()(jnp.swapaxes(nn.Dense(8)(x), 0, 1)), 0, 1)


def used_elsewhere():
    loss_fn, params, x = problem(PLAIN(nn.LayerNorm))
    norm = "LayerNorm_0"
    return lambda p, x: loss_fn(p, x) + sum(map(jnp.sum, p[norm].values())) ** 2, params, x


def changed_before():
    loss_fn, params, x = problem(PLAIN(nn.LayerNorm))
    return lambda p, x: loss_fn(jax.tree.map(jnp.sin, p), x), params, x


GENERAL = {
    "called_twice": lambda: problem(Twice()),
    "used_elsewhere": used_elsewhere,
    "changed_before": changed_before,
    "nn_vmap": lambda: problem(Mapped()),
    "rows_behind_positions": lambda: problem(RowsBehind()),
}


@pytest.mark.quick("nn_vmap")
@pytest.mark.parametrize("name", GENERAL)
def test_norms_that_the_function_does_not_fit_are_exact_all_the_same(name, doubled):
    check(*GENERAL[name]())
    assert doubled == []


def tripled(next_fun, args, kwargs, context):
    outputs = next_fun(*args, **kwargs)
    return 3 * outputs if isinstance(context.module, nn.RMSNorm) else outputs


def moved(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.RMSNorm):
        args = (args[0] + jnp.arange(8.0)[None, None],)
    return next_fun(*args, **kwargs)


def replaced(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.RMSNorm):
        return jnp.sin(args[0]) * context.module.variables["params"]["scale"][None, None]
    return next_fun(*args, **kwargs)


def watched(next_fun, args, kwargs, context):
    return next_fun(*args, **kwargs)


INTERCEPTORS = [tripled, moved, replaced, watched]


def test_vectorization_that_puts_another_axis_last():
    """Of the size of the features, for which it might be taken."""

    def loss_fn(params, x):
        def normalized(x):
            return nn.RMSNorm().apply({"params": params}, x)

        outputs = jax.vmap(normalized, in_axes=-1, out_axes=-1)(x)
        return squared(outputs * jnp.arange(16.0).reshape(1, 4, 4))

    check(loss_fn, {"scale": jnp.linspace(0.5, 2, 4)}, activations(7, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("interceptor", INTERCEPTORS)
def test_interceptors_around_the_engine(interceptor, doubled):
    problem_ = problem(PLAIN(nn.RMSNorm))
    with nn.intercept_methods(interceptor):
        if interceptor is watched:
            assert_doubled(*problem_, doubled)
        else:
            check(*problem_)
            assert doubled == []


@pytest.mark.quick("moved", "watched")
@pytest.mark.parametrize("interceptor", INTERCEPTORS)
def test_interceptors_inside_the_loss(interceptor, doubled):
    loss_fn, params, x = problem(PLAIN(nn.RMSNorm))

    def intercepted(params, x):
        with nn.intercept_methods(interceptor):
            return loss_fn(params, x)

    check(intercepted, params, x)
    assert doubled == []


@pytest.mark.parametrize("shape", [(), (3,), (4, 1)])
def test_dots_of_another_shape_are_noticed_before_they_are_summed(shape, monkeypatch):
    monkeypatch.setattr(
        layernorm,
        "layernorm_dot_products",
        lambda *args, **kwargs: {"scale": jnp.zeros(shape), "bias": jnp.zeros(shape)},
    )
    loss_fn, params, x = problem(PLAIN(nn.LayerNorm))
    with pytest.raises(AssertionError, match=r"expected \(4\)"):
        GradDotProdEngine(loss_fn, val_batch_size=3)(params, x)
