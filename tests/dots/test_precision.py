"""Narrow dtypes and wide ones, loss scaling, and what steps are lowered to for accelerators."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions, testing, value_and_dots_fn, value_grad_and_dots
from ghostjax.core import routes
from models.arrays import K, direction_like, directions_like, draw, mean_squares
from tests.dots.checks import expected_dots, expected_stacked
from tests.variants import crossed

B, T, WIDTH, HIDDEN = 5, 7, 6, 8
PARAMS = {
    "scale": 1 + draw(WIDTH) / 4,
    "first": draw(WIDTH, HIDDEN) / 2,
    "bias": draw(HIDDEN),
    "second": draw(HIDDEN, WIDTH) / 2,
}
X = draw(B, T, WIDTH, seed=1)
DIRECTIONS = directions_like(PARAMS)
FIRST = direction_like(PARAMS)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def row_losses(params, x):
    h = jnp.tanh((x * params["scale"][None, None]) @ params["first"] + params["bias"][None, None])
    return mean_squares((h @ params["second"] - x).astype(jnp.float32))


def computed_in(dtype):
    """Parameters are cast inside: what a policy of mixed precision does."""
    return lambda params, x: row_losses(cast(params, dtype), x.astype(dtype))


def mean(losses):
    return lambda params, x: jnp.mean(losses(params, x))


def early(loss_fn, reduction="mean"):
    def run(params, x, direction):
        result = value_grad_and_dots(loss_fn, loss_reduction=reduction)(
            params, x, direction=direction
        )
        return result.grads, result.dots

    return run


def late(loss_fn, reduction="mean"):
    def run(params, x, direction):
        _, grads, dots = value_and_dots_fn(loss_fn, loss_reduction=reduction)(params, x)
        return grads, dots(direction)

    return run


# dtype of the parameters, and of what is computed
POLICIES = {
    "f32": ("float32", "float32"),
    "mixed": ("float32", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16"),
}


@pytest.mark.parametrize(("policy", "form"), crossed(POLICIES, [early, late]))
def test_policies(policy, form, standard_promotion):
    """Dots are float32, as near as the dtype allows; gradients are those of the plain step."""
    stored, computed = POLICIES[policy]
    losses = computed_in(computed)
    params, stacked = cast((PARAMS, DIRECTIONS), stored)
    grads, dots = jax.jit(form(mean(losses)))(params, X, stacked)
    chex.assert_trees_all_equal(grads, jax.jit(jax.grad(mean(losses)))(params, X))
    assert {leaf.dtype for leaf in jax.tree.leaves(dots)} == {jnp.dtype(jnp.float32)}
    rtol = 1e-5 if computed == "float32" else 1e-2
    testing.assert_dots_close(dots, expected_stacked(losses, params, X, stacked), rtol=rtol)


@pytest.mark.parametrize("form", [early, late])
def test_float64(form):
    with jax.enable_x64(True):
        params, x, direction = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
            for tree in (PARAMS, X, FIRST)
        )

        def losses(params, x):
            return mean_squares(jnp.tanh(x @ params["first"]) @ params["second"] - x)

        params = {name: params[name] for name in ("first", "second")}
        direction = {name: direction[name] for name in params}
        _, dots = jax.jit(form(mean(losses)))(params, x, direction)
        assert {leaf.dtype for leaf in jax.tree.leaves(dots)} == {jnp.dtype(jnp.float64)}
        expected = expected_dots(losses, params, x, direction)
        testing.assert_dots_close(dots, expected, rtol=1e-13)


@pytest.mark.parametrize("form", [early, late])
def test_loss_scaling(form, standard_promotion):
    """In float16, where the cotangents of a small loss are zero: the scaled loss has them, and
    gradients and dots divided by the scale are those of float32, whatever the scale."""
    small = 1e-7

    def scaled(scale):
        return lambda params, x: scale * small * mean(computed_in(jnp.float16))(params, x)

    @jax.jit
    def step(scale):
        found = form(scaled(scale))(PARAMS, X, FIRST)
        return jax.tree.map(lambda leaf: leaf / scale, found)

    grads, dots = step(jnp.float32(2.0**26))
    testing.assert_dots_close((grads, dots), step(jnp.float32(2.0**27)), rtol=1e-4)
    wide = mean(row_losses)
    testing.assert_dots_close(
        grads, jax.jit(jax.grad(lambda *args: small * wide(*args)))(PARAMS, X), rtol=1e-2
    )
    expected = expected_dots(row_losses, PARAMS, X, FIRST)
    testing.assert_dots_close(dots, jax.tree.map(lambda leaf: small * leaf, expected), rtol=1e-2)
    _, unscaled = step(jnp.float32(1))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(unscaled))


def test_a_step_that_overflows_is_skipped_and_seen(standard_promotion):
    """``optax.apply_if_finite`` leaves the parameters, and no score of the step is finite."""
    tx = optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=3)

    @jax.jit
    def step(scale):
        loss_fn = lambda params, x: scale * mean(computed_in(jnp.float16))(params, x)  # noqa: E731
        grads, dots = late(loss_fn)(PARAMS, X, FIRST)
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        return updates, sum(jax.tree.leaves(dots))

    updates, scores = step(jnp.float32(2.0**30))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert not jnp.isfinite(scores).any()


def operations(function, *args) -> collections.Counter:
    """Of products and sums in the StableHLO for a TPU: (operation, shape, dtype) of the result."""
    exported = jax.export.export(jax.jit(lambda *args: function(*args)), platforms=["tpu"])(*args)
    found = re.findall(
        r"stablehlo\.(dot_general|reduce)\b.* -> tensor<((?:\d+x)*)(\w+)>", exported.mlir_module()
    )
    return collections.Counter(found)


@pytest.mark.parametrize("rows", [False, True], ids=["tangents", "rows"])
@pytest.mark.parametrize("count", [None, K])
@pytest.mark.parametrize(("policy", "form"), crossed(["mixed", "bf16"], [early, late]))
def test_sums_for_dots_are_float32(policy, form, count, rows, monkeypatch, standard_promotion):
    """In the lowered program: of what dots add to the plain step, tangents alone are bfloat16."""
    monkeypatch.setattr(routes, "rows_cost_less", lambda *args, **kwargs: rows)
    stored, computed = POLICIES[policy]
    loss_fn = mean(computed_in(computed))
    params, one, several = cast((PARAMS, FIRST, DIRECTIONS), stored)
    added = operations(form(loss_fn), params, X, one if count is None else several)
    added -= operations(jax.grad(loss_fn), params, X)
    sums = [dtype for operation, _, dtype in added if operation == "reduce"]
    products = {(shape, dtype) for operation, shape, dtype in added if operation == "dot_general"}
    assert set(sums) == {"f32"}
    narrow = {shape for shape, dtype in products if dtype != "f32"}
    # What is summed over rows is float32: a row's part of a weight's gradient, dots [K, B].
    assert all(shape.startswith(f"{B}x{T}x") for shape in narrow)
    assert bool(narrow) != rows
    assert not rows or {f"{B}x{WIDTH}x{HIDDEN}x", f"{B}x{HIDDEN}x{WIDTH}x"} <= {
        shape for shape, dtype in products if dtype == "f32"
    }


@pytest.mark.parametrize(("form", "rows"), crossed([early, late], [False, True]))
def test_dots_of_whole_numbers_are_exact(form, rows, monkeypatch, standard_promotion):
    """bfloat16 holds numbers up to 256: all tangents and cotangents here, but not their products
    and sums, which float32 holds."""
    monkeypatch.setattr(routes, "rows_cost_less", lambda *args, **kwargs: rows)
    generator = np.random.default_rng(3)

    def numbers(largest, *shape):
        return generator.integers(-largest, largest + 1, shape)

    x, weights = numbers(4, B, T, WIDTH), numbers(99, B, T, HIDDEN)
    params = {"w": numbers(4, WIDTH, HIDDEN), "b": numbers(4, HIDDEN)}
    stacked = {"w": numbers(4, K, WIDTH, HIDDEN), "b": numbers(4, K, HIDDEN)}

    def loss_fn(params, batch):
        outputs = batch["x"] @ params["w"] + params["b"][None, None]
        return jnp.sum((outputs * batch["weights"]).astype(jnp.float32))

    given = jax.tree.map(jnp.asarray, (params, {"x": x, "weights": weights}, stacked))
    _, dots = jax.jit(form(loss_fn, "sum"))(*cast(given, jnp.bfloat16))
    expected = {
        "w": np.einsum("bti,bto,kio->kb", x, weights, stacked["w"]),
        "b": np.einsum("bto,ko->kb", weights, stacked["b"]),
    }
    for name, own in expected.items():
        assert abs(own).max() > 256
        np.testing.assert_array_equal(dots[name], own)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_step_lowers_for_accelerators(policy, standard_promotion):
    stored, computed = POLICIES[policy]
    loss_fn, tx = mean(computed_in(computed)), optax.adamw(1e-3)

    def step(params, state, x, val):
        _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
        val_grads = jax.grad(loss_fn)(params, val)
        direction = directions.through_optimizer(tx, state, params, grads, val_grads)
        scores = dots.result(direction).total()
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, scores

    params = cast(PARAMS, stored)
    exported = jax.export.export(jax.jit(step), platforms=["cpu", "tpu", "cuda"])(
        params, tx.init(params), X, X[:2]
    )
    assert exported.out_avals[-1].dtype == jnp.float32
    # No dot is a sum in bfloat16: reductions to one number a row are of float32.
    sums = re.findall(r"stablehlo\.reduce\(.*-> tensor<5x(?:\d+x)*(\w+)>", exported.mlir_module())
    assert sums
    assert set(sums) == {"f32"}
