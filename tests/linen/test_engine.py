"""What the engine promises beyond the numbers of one batch."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import GradDotProdEngine, aggregate, testing
from models.modules import CASES
from models.modules.products import TiedHead
from models.modules.table import VOCAB, activations, perturbed, squared

B, V = 4, 3


def tied(rows=B + V):
    loss_fn, params, batch = CASES["tied_head"](rows, 7, jnp.float32)
    return loss_fn, params, batch, GradDotProdEngine(loss_fn, val_batch_size=V)


@pytest.fixture(scope="module")
def tied_result():
    _, params, batch, engine = tied()
    return params, batch, engine, engine(params, batch)


def test_permuting_training_rows_permutes_dots(tied_result):
    params, batch, engine, result = tied_result
    order = np.array([2, 0, 3, 1, 4, 5, 6])
    permuted = engine(params, jax.tree.map(lambda leaf: leaf[order], batch))
    expected = jax.tree.map(lambda leaf: leaf[order[:B]], result.dots)
    testing.assert_dots_close(permuted.dots, expected, rtol=1e-5)


def test_permuting_validation_rows_changes_nothing(tied_result):
    params, batch, engine, result = tied_result
    order = np.array([0, 1, 2, 3, 6, 4, 5])
    permuted = engine(params, jax.tree.map(lambda leaf: leaf[order], batch))
    testing.assert_dots_close(permuted.dots, result.dots, rtol=1e-5)


def test_splitting_the_training_rows_changes_nothing(tied_result):
    params, batch, engine, result = tied_result
    halves = [
        engine(params, jax.tree.map(lambda leaf, rows=rows: leaf[np.array(rows)], batch))
        for rows in ([0, 1, 4, 5, 6], [2, 3, 4, 5, 6])
    ]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(half.dots for half in halves))
    testing.assert_dots_close(joined, result.dots, rtol=1e-5)


def test_dots_sum_to_the_inner_product_of_the_gradients(tied_result):
    """mean_i dots[i] = < grads, gradient of the validation loss >, per parameter."""
    params, batch, _, result = tied_result
    loss_fn = tied()[0]
    val = jax.tree.map(lambda leaf: leaf[B:], batch)
    val_grads = jax.grad(lambda p: loss_fn(p, val).mean())(params)
    jax.tree.map(
        lambda dots, grad, val_grad: np.testing.assert_allclose(
            dots.mean(), jnp.vdot(grad, val_grad), rtol=1e-4, atol=1e-6
        ),
        result.dots,
        result.grads,
        val_grads,
    )


def test_training_is_not_changed(standard_promotion):
    """Ten steps of AdamW with and without the engine give equal parameters."""
    loss_fn, start, batch, engine = tied(rows=11)
    train = jax.tree.map(lambda leaf: leaf[:8], batch)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def plain(params, state):
        grads = jax.grad(lambda p: loss_fn(p, train).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def with_engine(params, state):
        updates, state = optimizer.update(engine(params, batch).grads, state, params)
        return optax.apply_updates(params, updates), state

    results = []
    for step in (plain, with_engine):
        params, state = start, optimizer.init(start)
        for _ in range(10):
            params, state = step(params, state)
        results.append(params)
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), results[0], start)
    assert min(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.slow
def test_one_trace_for_equal_shapes():
    loss_fn, params, batch, _ = tied()
    calls = []

    def counted(params, batch):
        calls.append(None)
        return loss_fn(params, batch)

    engine = GradDotProdEngine(counted, val_batch_size=V)
    for _ in range(3):
        engine(params, batch)
    assert len(calls) == 1
    engine(params, jax.tree.map(lambda leaf: leaf[1:], batch))
    assert len(calls) == 2


def test_inside_a_larger_jitted_step_with_donation(tied_result):
    _, batch, engine, result = tied_result
    params = tied()[1]  # donated below

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, batch):
        result = engine(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, result.grads), result.total()

    step = jax.jit(step, donate_argnums=0)
    params, total = step(params, batch)
    np.testing.assert_allclose(total, result.total(), rtol=1e-5)
    step(params, batch)


@pytest.mark.slow
def test_further_arguments_reach_the_loss():
    """Dropout: the same key gives the same masks in the engine and in the oracle."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(16)(x))
            return nn.Dropout(0.3, deterministic=False)(nn.LayerNorm()(x))

    def loss_fn(params, batch, key, *, target):
        outputs = Net().apply({"params": params}, batch, rngs={"dropout": key})
        return jnp.mean(jnp.square(outputs - target), axis=1)

    batch = activations(7, 8)
    params = {
        "Dense_0": perturbed(nn.Dense(16), batch),
        "LayerNorm_0": perturbed(nn.LayerNorm(), np.ones((7, 16), np.float32)),
    }
    key = jax.random.key(5)
    result = GradDotProdEngine(loss_fn, val_batch_size=2)(params, batch, key, target=1.0)
    expected = testing.per_example_dots(loss_fn, params, batch, 2, key, target=1.0)
    testing.assert_dots_close(result.dots, expected)


def test_switches_are_static():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=deterministic)

    model = Net()

    def loss_fn(params, batch, deterministic, name=None):
        assert deterministic is True
        assert name == "evaluation"
        return squared(model.apply({"params": params}, batch, deterministic=deterministic))

    def plain(params, batch):
        return loss_fn(params, batch, True, name="evaluation")

    batch = activations(7, 8)
    params = perturbed(model, batch, deterministic=True)
    engine = GradDotProdEngine(loss_fn, val_batch_size=2)
    result = engine(params, batch, True, name="evaluation")
    testing.assert_dots_close(result.dots, testing.per_example_dots(plain, params, batch, 2))


class Noisy(nn.Module):
    """A layer that owns a parameter and draws random numbers in the same call."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 5))
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return jnp.sin((x + noise) @ kernel)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_layer_that_draws_random_numbers(calls):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            noisy, out = Noisy(), nn.Dense(3)
            return sum(out(noisy(x * (call + 1))) for call in range(calls))

    def loss_fn(params, batch, key):
        return squared(Net().apply({"params": params}, batch, rngs={"noise": key}))

    batch, key = activations(7, 8), jax.random.key(3)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), leaf.dtype),
        jax.eval_shape(lambda: Net().init({"params": key, "noise": key}, batch))["params"],
    )
    result = GradDotProdEngine(loss_fn, val_batch_size=3)(params, batch, key)
    testing.assert_dots_close(result.dots, testing.per_example_dots(loss_fn, params, batch, 3, key))
    np.testing.assert_allclose(result.value, loss_fn(params, batch, key)[:4].mean(), rtol=1e-5)


def test_a_module_that_holds_an_array_with_a_row_axis():
    class Gated(nn.Module):
        gate: jax.Array

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 5))
            return jnp.sin(x @ kernel) * self.gate

    def loss_fn(params, batch):
        return squared(Gated(batch["gate"]).apply({"params": params}, batch["x"]))

    batch = {"x": activations(7, 8), "gate": activations(7, 1)}
    params = {"kernel": jnp.asarray(activations(8, 5))}
    result = GradDotProdEngine(loss_fn, val_batch_size=3)(params, batch)
    testing.assert_dots_close(result.dots, testing.per_example_dots(loss_fn, params, batch, 3))


def test_float64_stays_float64(standard_promotion):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2,), param_dtype=jnp.float64)(x)
            x = nn.LayerNorm(param_dtype=jnp.float64)(x)
            return nn.Dense(2, param_dtype=jnp.float64)(x)

    def loss_fn(params, batch):
        outputs = Net().apply({"params": params}, batch)
        return jnp.mean(jnp.square(outputs), axis=(1, 2))

    with jax.enable_x64(True):
        batch = activations(7, 5, 3).astype(np.float64)
        params = perturbed(Net(), batch)
        result = GradDotProdEngine(loss_fn, val_batch_size=2)(params, batch)
        expected = testing.per_example_dots(loss_fn, params, batch, 2)
        testing.assert_dots_close(result.dots, expected, rtol=1e-12)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.float64)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layernorm_rank_3", "convolutions", "lstm", "shared_three_times"])
def test_a_nan_reaches_its_own_row_only(name):
    loss_fn, params, batch = CASES[name](7, 3, jnp.float32)
    engine = GradDotProdEngine(loss_fn, val_batch_size=3)
    clean = engine(params, batch).total()
    batch = np.array(batch)
    batch[1] = np.nan
    dots = engine(params, batch).total()
    assert np.isnan(dots[1])
    rest = np.array([0, 2, 3])
    np.testing.assert_allclose(dots[rest], clean[rest], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("tied_head", AxisType.Auto),
        ("layernorm_rank_3", AxisType.Explicit),
        pytest.param("scan_of_remat", AxisType.Explicit, marks=pytest.mark.slow),
    ],
    ids=["automatic", "explicit", "explicit_scan"],
)
def test_rows_sharded_over_devices_give_dots_sharded_alike(name, axis_type, standard_promotion):
    loss_fn, params, batch = CASES[name](24, 7, jnp.float32)
    engine = GradDotProdEngine(loss_fn, val_batch_size=8)
    expected = engine(params, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params, batch = jax.device_put((params, batch), (NamedSharding(mesh, PartitionSpec()), rows))
    with jax.set_mesh(mesh):
        result = jax.jit(engine)(params, batch)
    testing.assert_dots_close(jax.device_get(result.dots), jax.device_get(expected.dots))
    testing.assert_dots_close(jax.device_get(result.grads), jax.device_get(expected.grads))
    assert all(leaf.sharding.is_equivalent_to(rows, 1) for leaf in jax.tree.leaves(result.dots))


def test_coverage_names_the_operations_of_every_parameter():
    _, params, batch, engine = tied()
    coverage = engine.coverage({**params, "unused": jnp.ones(2)}, batch)
    here = r".*products\.py:\d+"
    expected = {
        "['Embed_0']['embedding']": [rf"gather in _take at {here}", rf"dot_general at {here}"],
        "['LayerNorm_0']['scale']": [rf"ghostjax_LayerNorm_bias_scale at {here}"],
        "['LayerNorm_0']['bias']": [rf"ghostjax_LayerNorm_bias_scale at {here}"],
        "['Dense_0']['kernel']": [rf"dot_general at {here}"],
        "['Dense_0']['bias']": [rf"add at {here}"],
        "['unused']": [],
    }
    assert coverage.keys() == expected.keys()
    for name, places in coverage.items():
        assert len(places) == len(expected[name])
        assert all(map(re.fullmatch, expected[name], places)), places


def test_coverage_names_the_line_of_a_cell_that_a_library_loops_over():
    loss_fn, params, batch = CASES["gru"](B + V, 3, jnp.float32)
    coverage = GradDotProdEngine(loss_fn, val_batch_size=V).coverage(params, batch)
    [place] = coverage["['GRUCell_0']['hn']['kernel']"]
    assert re.fullmatch(r"dot_general in scan at .*recurrent\.py:\d+", place)


def test_aggregate_checks_every_leaf():
    with pytest.raises(AssertionError, match="rank"):
        aggregate({"scale": jnp.ones((4, 8)), "bias": jnp.ones(4)})
    with pytest.raises(AssertionError, match="shape"):
        aggregate({"scale": jnp.ones(4), "bias": jnp.ones(7)})
    with pytest.raises(AssertionError, match="type"):
        aggregate({"scale": jnp.ones(4, int)})
    with pytest.raises(ValueError, match="no leaves"):
        aggregate({})


def test_vocabulary_of_the_table_is_small():
    """The tied case scatters several positions into one row of the table."""
    assert VOCAB < 7 * 7
    assert TiedHead(jnp.float32).dtype == jnp.float32
