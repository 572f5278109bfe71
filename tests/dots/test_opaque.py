"""Operations that cannot be looked into: dots of what is around them, or an error by name."""

import jax
import jax.numpy as jnp
import pytest

from tests.dots import kernels
from tests.dots.checks import check, check_late
from tests.dots.kernels import B, F, T

NORMS = {
    "a row of positions a block": lambda: kernels.norm_of_positions(T),
    "a position a block": lambda: kernels.norm_of_positions(1),
    "part of a row a block": lambda: kernels.norm_of_positions(2),
    "two rows a block": lambda: kernels.norm_of_positions(8),
    "all rows in one block": lambda: kernels.norm_of_positions(12),
    "rows inside": kernels.norm_of_time_major,
    "vmap": kernels.norm_under_vmap,
    "vmap of positions": kernels.norm_under_vmap_of_positions,
    "scan, remat": kernels.norm_in_scanned_layers,
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_with_a_scale(name):
    losses, params, x = NORMS[name]()
    result = check(losses, params, x)
    assert jax.tree.leaves(result.dots)[0].shape == (B,)


def test_norms_with_late_directions():
    check_late(*NORMS["two rows a block"]())
