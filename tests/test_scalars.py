"""Scalars that many equations use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions
from ghostjax._scalars import evaluate

CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


def optimized_size(count, function):
    """Instructions that XLA makes of ``function`` for ``count`` parameters."""
    params = {f"layer_{number}": jnp.ones(number + 2) for number in range(count)}
    compiled = jax.jit(lambda *args: function(CLIPPED, CLIPPED.init(params), params, *args)).lower(
        params, params
    )
    return compiled.compile().as_text().count(" = ")


def count_undefined(tx, opt_state, params, grads, val_grads):
    return directions.count_undefined(tx, opt_state, params, grads)


@pytest.mark.slow
@pytest.mark.parametrize("function", [directions.through_optimizer, count_undefined])
def test_the_code_grows_with_the_number_of_parameters_not_its_square(function):
    # 4 would be in proportion, 16 the square.
    assert optimized_size(64, function) < 6 * optimized_size(16, function)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1 / 3, jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shared_scalars_keep_their_bits(value, dtype):
    def function(x):
        shared = x + jnp.zeros((), dtype)
        return [shared * jnp.asarray(factor, dtype) for factor in range(1, 10)]

    closed = jax.make_jaxpr(function)(jnp.zeros((), dtype))
    x = jnp.asarray(value, dtype)
    found = jax.jit(lambda x: evaluate(closed, [x]))(x)
    for own, expected in zip(found, jax.jit(function)(x), strict=True):
        np.testing.assert_array_equal(
            own.view(f"u{own.itemsize}"), expected.view(f"u{own.itemsize}")
        )
