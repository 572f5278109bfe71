"""Norms, clipped gradients, pairs and cosines: the tables of functions, models and moved rows."""

import jax
import jax.numpy as jnp
import pytest

from models.flax import MODELS, SUMMED
from models.functions import FUNCTIONS
from models.layers import LAYERS
from models.libraries import LIBRARIES
from models.modules import CASES as LINEN
from tests.dots.rules import RULES
from tests.dots.test_moved_rows import CASES as MOVED
from tests.dots.test_moved_rows import PARAMS, X
from tests.norms.checks import Rows, check_all, mean_of, sum_of
from tests.variants import some_quick

pytestmark = pytest.mark.usefixtures("standard_promotion")

# One of each kind where time matters: tied and stacked weights, products of parameters, weights
# between loops, convolutions, backward rules, and rows in a loop.
QUICK = {
    "class_token",
    "embedding_and_labels",
    "layers_in_a_loop",
    "low_rank_adapter",
    "gpt2_scan_remat",
    "cnn",
    "embeddings",
    "inside_control_flow",
    "chunked_outputs",
    "sorted_tokens",
}
# A norm takes biases away, so that their gradient is zero but for rounding; and a rule asserts that
# parameters are differentiated, which in these passes they are not.
EXCLUDED = {"instancenorm", "symbolic_zeros"}


def variants(names):
    return some_quick([name for name in names if name not in EXCLUDED], QUICK)


def check_mean(row_losses, params, batch):
    with jax.numpy_rank_promotion("allow"):
        check_all(mean_of(row_losses), Rows.of(row_losses, params, batch), params, batch)


def check_sum(row_losses, params, batch):
    rows = Rows.of(row_losses, params, batch)
    check_all(sum_of(row_losses), rows, params, batch, loss_reduction="sum")


@pytest.mark.quick("layers_in_a_loop")
@pytest.mark.parametrize("name", variants(FUNCTIONS))
def test_functions(name):
    check_mean(*FUNCTIONS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", variants(MODELS))
def test_models(name):
    (check_sum if name in SUMMED else check_mean)(*MODELS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", variants(RULES))
def test_backward_rules(name):
    check_sum(*RULES[name]())


@pytest.mark.quick("sorted_tokens")
@pytest.mark.parametrize("name", variants(MOVED))
def test_moved_rows(name):
    loss_fn, row_losses = MOVED[name]
    check_all(loss_fn, Rows.of(row_losses, PARAMS, X), PARAMS, X)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check_mean(*LAYERS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries(name):
    check_mean(*LIBRARIES[name]())


@pytest.mark.weekly
@pytest.mark.parametrize("name", variants(LINEN))
def test_linen_modules(name):
    check_mean(*LINEN[name](6, 6, jnp.float32))
