"""Fixtures of tests of directions."""

import jax
import jax.numpy as jnp
import pytest

from tests.directions.checks import draw_like


@pytest.fixture
def params():
    """In float64, for finite differences."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield draw_like(
            {"w": jnp.zeros((4, 3)), "layer": {"b": jnp.zeros(3), "s": jnp.zeros(())}}, 0
        )
