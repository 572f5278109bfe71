"""Late directions against per-row autodiff: all models of the tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_and_dots_fn
from models.arrays import POSITIONS, ROWS, directions_like
from models.flax import MODELS, ROUNDED, SUMMED
from models.layers import LAYERS
from models.libraries import EQUINOX, LIBRARIES, over_rows
from models.modules import CASES
from tests.dots.checks import check_late, expected_stacked
from tests.variants import some_quick

# GPT-2 and plain functions are in test_late.
QUICK = {
    "branches_in_a_scan",
    "custom_vjp_norm",
    "checkpoint_names",
    "equinox_mlp",
    "tied_head",
}

# XLA fuses the operations of the gradient otherwise where cotangents of a branch are kept; without
# jit they are the same to the bit.
FUSED_OTHERWISE = {"branches_in_a_scan"}
# Its norm takes biases away, so that their gradient is zero but for rounding.
CANCELLED = {"instancenorm"}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("name", some_quick(MODELS, QUICK))
def test_models(name):
    reduction = "sum" if name in SUMMED else "mean"
    check_late(*MODELS[name](), reduction, exact_gradient=name not in ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    exact_gradient = "checkpoint" not in name and name not in FUSED_OTHERWISE
    check_late(*LAYERS[name](), exact_gradient=exact_gradient)


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries(name):
    with jax.numpy_rank_promotion("allow"):
        check_late(*LIBRARIES[name](), exact_gradient="remat" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in CANCELLED])
def test_flax_models(name):
    check_late(*CASES[name](ROWS, POSITIONS, jnp.float32), exact_gradient="remat" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_models_of_one_row(name):
    with jax.numpy_rank_promotion("allow"):
        loss, params, batch = EQUINOX[name]()
        directions = directions_like(params)

        @jax.jit
        def run(params, batch, directions):
            dots = value_and_dots_fn(loss, per_example=True)(params, batch)[2]
            return dots.result(directions)

        result = run(params, batch, directions)
        expected = expected_stacked(over_rows(loss), params, batch, directions)
    testing.assert_dots_close(result.dots, expected)
    errors = conservation_error(result, directions)
    assert max(np.max(leaf) for leaf in jax.tree.leaves(errors)) <= 1e-5
