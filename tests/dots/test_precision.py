"""Loss scaling, and what a whole step is lowered to for accelerators."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from ghostjax import directions, testing, value_and_dots_fn, value_grad_and_dots
from tests.dots.checks import direction_like, draw

PARAMS = {"first": draw(6, 8) / 2, "second": draw(8, 6) / 2}
X = draw(5, 7, 6, seed=1)


def loss_fn(params, x):
    h = jnp.tanh(x @ params["first"]) @ params["second"]
    return jnp.mean(jnp.square((h - x).astype(jnp.float32)))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def test_loss_scaling():
    """Dots divided by the scale do not depend on it, where float16 holds the scaled gradients."""
    params, x = cast(PARAMS, jnp.float16), X.astype(jnp.float16)
    direction, scale = direction_like(params), 2.0**6

    @jax.jit
    def dots(scale):
        fn = value_grad_and_dots(lambda params, x: scale * loss_fn(params, x))
        return jax.tree.map(lambda leaf: leaf / scale, fn(params, x, direction=direction).dots)

    scaled = dots(jnp.float32(scale))
    testing.assert_dots_close(scaled, dots(jnp.float32(2 * scale)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(scaled))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_whole_step_lowers_for_accelerators(dtype, standard_promotion):
    tx = optax.adamw(1e-3)

    def step(params, state, x, val):
        _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
        val_grads = jax.grad(loss_fn)(params, val)
        direction = directions.through_optimizer(tx, state, params, grads, val_grads)
        scores = dots.result(direction).total()
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, scores

    params, x = cast(PARAMS, dtype), X.astype(dtype)
    exported = jax.export.export(jax.jit(step), platforms=["cpu", "tpu", "cuda"])(
        params, tx.init(params), x, x[:2]
    )
    assert exported.out_avals[-1].dtype == jnp.float32
    # No dot is a sum in bfloat16: reductions to one number a row are of float32.
    sums = re.findall(r"stablehlo\.reduce\(.*-> tensor<5x(\w+)>", exported.mlir_module())
    assert sums
    assert set(sums) == {"f32"}
