"""value_grad_and_dots against per-row autodiff: models of Flax and other libraries."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots
from models.arrays import direction_like
from models.flax import MODELS, ROUNDED, SUMMED, gpt2_with_key
from models.layers import LAYERS
from models.libraries import EQUINOX, LIBRARIES, nnx_dropout_with_state, over_rows
from tests.dots.checks import check, expected_dots

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.quick("gpt2")
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    reduction = "sum" if name in SUMMED else "mean"
    check(*MODELS[name](), reduction, exact_gradient=name not in ROUNDED)


@pytest.mark.quick(
    "custom_vjp_with_integers",
    "routed_experts",
    "custom_jvp_activations",
    "quantised_products",
    "weights_from_a_root",
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check(*LAYERS[name](), exact_gradient="checkpoint" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries(name):
    with jax.numpy_rank_promotion("allow"):
        check(*LIBRARIES[name](), exact_gradient="remat" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_models_of_one_row(name):
    with jax.numpy_rank_promotion("allow"):
        loss, params, batch = EQUINOX[name]()
        direction = direction_like(params)
        fn = value_grad_and_dots(loss, per_example=True)
        result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
        expected = expected_dots(over_rows(loss), params, batch, direction)
    testing.assert_dots_close(result.dots, expected)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def bias_dots(losses, params, batch, direction):
    """Per row, < cotangents of a layer's output, bias of the direction >, by path of the layer."""
    outputs = {}

    def note(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if "bias" in context.module.variables.get("params", {}):
            outputs[context.module.path] = output
        return output

    def add(call, args, kwargs, context):
        output = call(*args, **kwargs)
        return output + taps[context.module.path] if context.module.path in taps else output

    def tapped(zeros, params, batch):
        nonlocal taps
        taps = zeros
        with nn.intercept_methods(add):
            return losses(params, batch)

    taps = {}
    with nn.intercept_methods(note):
        jax.eval_shape(losses, params, batch)
    zeros = {path: jnp.zeros(output.shape, output.dtype) for path, output in outputs.items()}
    cotangents = jax.jit(jax.jacrev(tapped))(zeros, params, batch)
    return {
        path: np.tensordot(
            np.asarray(found, np.float64).reshape(len(found), -1, found.shape[-1]).sum(axis=1),
            np.asarray(functools.reduce(dict.get, path, direction)["bias"], np.float64),
            axes=1,
        )
        for path, found in cotangents.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_bfloat16(name):
    """Within 1e-2 of per-row autodiff in bfloat16, without exception.

    What rounds elsewhere is kept out: a mean would scale the cotangents, the direction is one that
    bfloat16 can hold, and the oracle's gradients of biases, which autodiff sums in bfloat16, are
    summed from the cotangents of the layers' outputs.
    """
    losses, params, batch = MODELS[name](dtype=jnp.bfloat16)
    direction = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), direction_like(params)
    )
    fn = value_grad_and_dots(lambda p, b: jnp.sum(losses(p, b)), loss_reduction="sum")
    dots = jax.jit(lambda p, b, v: fn(p, b, direction=v).dots)(params, batch, direction)
    assert {leaf.dtype for leaf in jax.tree.leaves(dots)} == {jnp.dtype(jnp.float32)}
    expected = expected_dots(losses, params, batch, direction)
    biases = bias_dots(losses, params, batch, direction)
    for path, found in biases.items():
        functools.reduce(dict.get, path, expected)["bias"] = found
    testing.assert_dots_close(dots, expected, rtol=1e-2)
    every = len([path for path in testing.relative_errors(dots, dots) if "bias" in path])
    assert len(biases) == every


@pytest.mark.slow
def test_the_key_of_dropout_is_an_argument_like_any_other():
    losses, params, tokens = gpt2_with_key()
    direction = direction_like(params)
    fn = value_grad_and_dots(lambda p, tokens, key: jnp.mean(losses(p, tokens, key)))
    run = jax.jit(lambda p, tokens, key, v: fn(p, tokens, key, direction=v).dots)
    for seed in (3, 4):
        key = jax.random.key(seed)
        expected = expected_dots(lambda p, b, key=key: losses(p, b, key), params, tokens, direction)
        testing.assert_dots_close(run(params, tokens, key, direction), expected)


def test_the_state_of_nnx_dropout_is_an_argument_like_any_other():
    with jax.numpy_rank_promotion("allow"):
        losses, params, x, state = nnx_dropout_with_state()
        direction = direction_like(params)
        fn = value_grad_and_dots(lambda p, x, state: jnp.mean(losses(p, x, state)))
        dots = jax.jit(lambda p, x, s, v: fn(p, x, s, direction=v).dots)(
            params, x, state, direction
        )
        expected = expected_dots(lambda p, x: losses(p, x, state), params, x, direction)
    testing.assert_dots_close(dots, expected)
