import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import testing
from ghostjax.runs.batches import make_rows
from ghostjax.runs.documents import Document
from ghostjax.runs.job import load_documents
from ghostjax.runs.models import GPT, SIZES
from ghostjax.runs.training import (
    DivergedError,
    Visits,
    init_params,
    make_optimizer,
    make_row_losses,
    make_schedule,
    make_step,
    train,
)

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = GPT(SIZES["micro"])
ROW_LOSSES = make_row_losses(MODEL)
LOSSES = jax.jit(ROW_LOSSES)
NUM_TRAIN, NUM_VAL, LENGTH = 4, 3, 16
TEXTS = [b"one and two", b"two and three and four", b"x = y[0]", b"for x in y:", b"to and fro"]
DOCUMENTS = [Document(f"a:{n}", "a", text) for n, text in enumerate(TEXTS)]


def rows_of(*indices):
    return make_rows([DOCUMENTS[n] for n in indices], [0] * len(indices), LENGTH)


BATCHES = [rows_of(0, 1, 2, 3, 4, 1, 0), rows_of(3, 4, 1, 0, 0, 1, 2), rows_of(2, 1, 0, 4, 3, 3, 4)]


@pytest.fixture
def params():
    return init_params(MODEL, LENGTH, seed=0)


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(make_schedule(1e-2, len(BATCHES)))


@pytest.fixture(scope="module")
def step(optimizer):
    return make_step(ROW_LOSSES, optimizer, NUM_VAL)


def test_a_row_loss_is_the_mean_over_its_own_tokens(params):
    padded = LOSSES(params, rows_of(0))
    exact = LOSSES(params, make_rows([DOCUMENTS[0]], [0], len(TEXTS[0]) - 1))
    np.testing.assert_allclose(padded, exact, rtol=1e-5)
    np.testing.assert_allclose(padded, np.log(256), rtol=0.02)


@pytest.fixture(scope="module")
def expected_dots():
    params = init_params(MODEL, LENGTH, seed=0)
    dots = testing.per_example_dots(ROW_LOSSES, params, BATCHES[0], NUM_VAL)
    return sum(jax.tree.leaves(dots))


def mean_train_loss(params, rows):
    return jnp.mean(ROW_LOSSES(params, jax.tree.map(lambda leaf: leaf[:NUM_TRAIN], rows)))


def test_the_dots_of_a_step_are_those_of_per_row_autodiff(params, optimizer, step, expected_dots):
    rows = BATCHES[0]
    losses = np.asarray(LOSSES(params, rows))
    *_, loss, val_loss, found = step(params, optimizer.init(params), rows)
    np.testing.assert_allclose(found, expected_dots, rtol=1e-4)
    np.testing.assert_allclose(loss, losses[:NUM_TRAIN].mean(), rtol=1e-5)
    np.testing.assert_allclose(val_loss, losses[NUM_TRAIN:].mean(), rtol=1e-5)


def test_training_is_that_without_the_engine(params, optimizer, step):
    @jax.jit
    def plain_step(params, state, rows):
        updates, state = optimizer.update(jax.grad(mean_train_loss)(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    plain, plain_state = params, optimizer.init(params)
    for rows in BATCHES:
        plain, plain_state = plain_step(plain, plain_state, rows)
    # The step takes over the buffers of its arguments.
    found = jax.tree.map(jnp.copy, params)
    state = optimizer.init(found)
    for rows in BATCHES:
        found, state, *_ = step(found, state, rows)

    def moved(left, right):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), left, right)))

    assert moved(plain, params) > 1e-3
    # Adam divides by the root of squares, which makes much of rounding where gradients vanish.
    assert moved(plain, found) < 1e-5


def test_scores_are_the_first_order_decrease_of_the_validation_loss(params, expected_dots):
    rows = BATCHES[0]
    learning_rate = 1e-3
    grads = jax.jit(jax.grad(mean_train_loss))(params, rows)
    moved = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
    before, after = (LOSSES(tree, rows)[NUM_TRAIN:].mean() for tree in (params, moved))

    nothing = np.zeros(NUM_TRAIN, int)
    visits = Visits(0, 0.0, 0.0, learning_rate, nothing, nothing, expected_dots.astype(np.float32))
    np.testing.assert_allclose(visits.scores.sum(), before - after, rtol=0.02)
    np.testing.assert_allclose(visits.scores, learning_rate * expected_dots / NUM_TRAIN, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_step_has_a_learning_rate(steps):
    rates = np.asarray(make_schedule(1e-2, steps)(jnp.arange(steps)))
    assert (rates > 0).all()
    np.testing.assert_allclose(rates.max(), 1e-2, rtol=1e-6)
    if steps > 1:
        np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-4)


def instead_of_steps(monkeypatch, *results):
    """Makes the steps return ``results`` (loss, val_loss, dots) without compiling anything."""

    def make_step(*args):
        return lambda params, opt_state, rows: (params, opt_state, *results)

    monkeypatch.setattr("ghostjax.runs.training.make_step", make_step)
    monkeypatch.setattr("ghostjax.runs.training.init_params", lambda *args: {"w": jnp.zeros(1)})


def test_documents_and_windows_depend_on_the_seed_alone(micro_config, monkeypatch):
    instead_of_steps(monkeypatch, 1.0, 1.0, np.zeros(4))
    data = load_documents(micro_config)

    def drawn(seed):
        steps = train(dataclasses.replace(micro_config, seed=seed), *data)
        return [(visits.indices.tolist(), visits.starts.tolist()) for visits in steps]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_initial_parameters_depend_on_the_seed_alone(params):
    chex.assert_trees_all_equal(init_params(MODEL, LENGTH, seed=0), params)
    other = init_params(MODEL, LENGTH, seed=1)["block_0"]["qkv"]["kernel"]
    assert not np.allclose(other, params["block_0"]["qkv"]["kernel"])


@pytest.mark.parametrize(
    "results",
    [
        (np.nan, 1.0, np.zeros(4)),
        (1.0, np.inf, np.zeros(4)),
        (1.0, 1.0, np.array([0, 0, np.nan, 0])),
    ],
    ids=["loss", "val_loss", "dots"],
)
def test_a_run_that_diverges_stops_with_an_error(micro_config, monkeypatch, results):
    instead_of_steps(monkeypatch, *results)
    steps = train(micro_config, *load_documents(micro_config))
    with pytest.raises(DivergedError, match=r"diverged at step 0 .*lower --learning-rate"):
        next(steps)
