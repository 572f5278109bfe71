"""Further arguments of the loss: arrays are traced, and the rest stays as it is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing, value_grad_and_dots
from tests.dots.checks import DENSE, X, dense, direction_like, expected_dots, mean_squares


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: Any = jnp.bfloat16
    shape: tuple[int, ...] = ()


@pytest.mark.parametrize("jitted", [False, True], ids=["plain", "jitted"])
def test_settings_that_have_a_dtype(jitted):
    """They are static; arrays beside them, of NumPy too, are arguments."""

    def loss_fn(params, x, settings, scales, *, like):
        assert isinstance(settings, Settings)
        assert isinstance(like, jax.ShapeDtypeStruct)
        assert all(isinstance(scale, jax.core.Tracer) for scale in scales)
        losses = mean_squares(dense(params, x)) * scales[0][0] * scales[1]
        return jnp.mean(losses.astype(settings.dtype).astype(like.dtype))

    scales = np.full(2, 3, np.float32), np.float32(0.5)
    like = jax.ShapeDtypeStruct((), jnp.float32)
    fn = value_grad_and_dots(loss_fn)
    if jitted:
        fn = jax.jit(fn, static_argnums=2, static_argnames="like")
    direction = direction_like(DENSE)
    result = fn(DENSE, X, Settings(jnp.float32), scales, like=like, direction=direction)
    expected = expected_dots(
        lambda params, x: 1.5 * mean_squares(dense(params, x)), DENSE, X, direction
    )
    testing.assert_dots_close(result.dots, expected)
