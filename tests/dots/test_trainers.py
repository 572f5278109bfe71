"""The lines of the README's table "In your trainer", for libraries that the tests always have."""

import pathlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import FEATURES, direction_like
from tests.dots.checks import X, expected_dots

README = pathlib.Path(__file__).parents[2] / "README.md"


def mean_squares(outputs):
    return jnp.mean(jnp.square(outputs))


def linen():
    model = nn.Sequential([nn.Dense(4), nn.gelu, nn.Dense(3)])
    params = model.init(jax.random.key(0), X)["params"]
    return params, lambda params, x: mean_squares(model.apply({"params": params}, x))


def nnx_net(*layers):
    rngs = nnx.Rngs(0, dropout=1)
    first, last = nnx.Linear(FEATURES, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
    return nnx.Sequential(first, *layers, last)


def nnx_split():
    noise = nnx.Dropout(0.5, broadcast_dims=(0,), rngs=nnx.Rngs(2))  # the same for every row
    graphdef, params, rest = nnx.split(nnx_net(noise), nnx.Param, ...)

    def loss_fn(params, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return mean_squares(model(x))

    return params, loss_fn


def equinox_net():
    return eqx.nn.MLP(FEATURES, 3, 4, 1, key=jax.random.key(0))


def equinox_partition():
    params, static = eqx.partition(equinox_net(), eqx.is_inexact_array)

    def loss_fn(params, x):
        model = eqx.combine(params, static)
        return mean_squares(jax.vmap(model)(x))

    return params, loss_fn


def compare(found, loss_fn, params, direction):
    rows = jax.vmap(lambda params, row: loss_fn(params, row[None]), (None, 0))
    testing.assert_dots_close(found, expected_dots(rows, params, X, direction))


@pytest.mark.parametrize("build", [linen, nnx_split, equinox_partition])
def test_parameters_apart(build):
    params, loss_fn = build()
    direction = direction_like(params)
    result = jax.jit(value_grad_and_dots(loss_fn))(params, X, direction=direction)
    compare(result.dots, loss_fn, params, direction)


@pytest.mark.slow
def test_an_nnx_module_in_the_place_of_value_and_grad():
    model = nnx_net(nnx.gelu)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(model, x):
        return mean_squares(model(x))

    _, direction = nnx.value_and_grad(loss_fn)(model, X)
    _, grads, dots = value_and_dots_fn(loss_fn)(model, X)
    testing.assert_dots_close(grads, direction, rtol=1e-6)

    def of_params(params, x):
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), x)

    compare(dots(direction), of_params, params, direction)


@pytest.mark.slow
def test_an_equinox_module_in_the_place_of_value_and_grad():
    def loss_fn(model, x):
        return mean_squares(jax.vmap(model)(x))

    _, direction = eqx.filter_value_and_grad(loss_fn)(equinox_net(), X)
    result = eqx.filter_jit(value_grad_and_dots(loss_fn))(equinox_net(), X, direction=direction)
    params, of_params = equinox_partition()
    compare(result.dots, of_params, params, direction)


def test_every_test_that_the_table_names_is_there():
    table = README.read_text().split("### In your trainer")[1].split("\n## ")[0]
    named = {word.strip("`,") for word in table.split() if word.startswith("`tests/")}
    assert len(named) >= 5
    assert all((README.parent / name).exists() for name in named)


@pytest.mark.slow
def test_labels_under_filter_jit():
    """Which binds arguments by the signature."""

    def loss_fn(model, x):
        return mean_squares(jax.vmap(model)(x))

    labels = jnp.arange(len(X)) % 2
    grads = eqx.filter_grad(loss_fn)(equinox_net(), X)
    fn = eqx.filter_jit(value_and_dots_fn(loss_fn))
    _, _, dots = fn(equinox_net(), X, labels=labels, num_labels=2)
    both = dots(grads)
    _, _, dots = fn(equinox_net(), X)
    expected = jax.tree.map(
        lambda leaf: jnp.stack([leaf[0::2].sum(), leaf[1::2].sum()]), dots(grads)
    )
    testing.assert_dots_close(both, expected)
