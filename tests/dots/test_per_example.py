"""per_example=True where vectorization alone would not repeat a value for every row."""

import chex
import jax
import jax.numpy as jnp
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots
from models.arrays import FEATURES, activations, direction_like, draw
from tests.dots.checks import expected_dots
from tests.variants import crossed

PARAMS = {"w": draw(FEATURES, FEATURES), "start": draw(FEATURES, seed=2)}


def initial_state(params, x):
    def cell(h, x):
        return jnp.tanh(x @ params["w"] + h), None

    h, _ = jax.lax.scan(cell, params["start"], x)
    return jnp.sum(h**2)


def branch(params, x):
    h = jax.lax.cond(
        x.sum() > 0, lambda x: x @ params["w"], lambda x: params["start"], jnp.sin(x[0])
    )
    return jnp.sum(jnp.sin(h))


def barrier(params, x):
    x, start = jax.lax.optimization_barrier((x, params["start"]))
    return jnp.sum(jnp.tanh(x @ params["w"]) * jnp.sin(start)[None])


def constant_beside_data(params, x):
    x, scale = jax.jit(lambda x: (jnp.sin(x), jnp.arange(1.0, FEATURES + 1)))(x)
    return jnp.sum(x @ params["w"]) + jnp.sum(jnp.sin(scale * params["start"]))


def parameters_alone(params, x):
    return jnp.sum(jnp.sin(params["w"] @ params["start"]))


def custom_vjp_beside_data(params, x):
    @jax.custom_vjp
    def both(x, start):
        return x * 2, start * 3

    both.defvjp(lambda x, start: (both(x, start), None), lambda _, g: (g[0] * 2, g[1] * 3))
    x, start = both(x, params["start"])
    return jnp.sum(jnp.sin(x @ params["w"]) * jnp.sin(start)[None])


LOSSES = [
    initial_state,
    branch,
    barrier,
    constant_beside_data,
    parameters_alone,
    custom_vjp_beside_data,
]


@pytest.mark.parametrize(("loss", "reduction"), crossed(LOSSES, ["mean", "sum"]))
def test_values_that_vectorization_does_not_repeat(loss, reduction):
    x, direction = activations(), direction_like(PARAMS)
    rows = jax.vmap(loss, (None, 0))
    fn = value_grad_and_dots(loss, per_example=True, loss_reduction=reduction)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(PARAMS, x, direction)
    testing.assert_dots_close(result.dots, expected_dots(rows, PARAMS, x, direction))
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[reduction]
    expected = jax.jit(jax.value_and_grad(lambda p: reduce(rows(p, x))))(PARAMS)
    chex.assert_trees_all_close((result.value, result.grads), expected, rtol=1e-5)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5
