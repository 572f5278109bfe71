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
    init_params,
    init_state,
    make_loss,
    make_optimizer,
    make_row_losses,
    make_schedule,
    make_step,
    train,
)

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = GPT(SIZES["micro"])
ROW_LOSSES = jax.jit(make_row_losses(MODEL))
LOSS = make_loss(MODEL)
NUM_TRAIN, LENGTH = 4, 16
TEXTS = [b"one and two", b"two and three and four", b"x = y[0]", b"for x in y:", b"to and fro"]
DOCUMENTS = [Document(f"a:{n}", "a", text) for n, text in enumerate(TEXTS)]


def rows_of(*indices):
    return make_rows([DOCUMENTS[n] for n in indices], [0] * len(indices), LENGTH)


BATCHES = [rows_of(0, 1, 2, 3), rows_of(3, 4, 1, 0), rows_of(2, 1, 0, 4)]
VAL = rows_of(4, 1, 0)


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(make_schedule(1e-2, len(BATCHES)))


@pytest.fixture(scope="module")
def step(optimizer):
    return make_step(LOSS, optimizer)


@pytest.fixture
def state(optimizer):
    return init_state(init_params(MODEL, LENGTH, seed=0), optimizer, LOSS, BATCHES[0])


def test_a_row_loss_is_the_mean_over_its_own_tokens(state):
    padded = ROW_LOSSES(state.params, rows_of(0))
    exact = ROW_LOSSES(state.params, make_rows([DOCUMENTS[0]], [0], len(TEXTS[0]) - 1))
    np.testing.assert_allclose(padded, exact, rtol=1e-5)
    np.testing.assert_allclose(padded, np.log(256), rtol=0.02)


def test_the_step_is_that_without_scores(state, optimizer, step):
    @jax.jit
    def plain_step(params, opt_state, rows):
        loss, grads = jax.value_and_grad(LOSS)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    start = jax.tree.map(jnp.copy, state.params)
    plain, opt_state = start, optimizer.init(start)
    for rows in BATCHES:
        plain, opt_state, loss = plain_step(plain, opt_state, rows)
        val_loss_before = LOSS(state.params, VAL)
        state, found_loss, val_loss, _ = step(state, rows, VAL)
        np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(val_loss, val_loss_before, rtol=1e-5)

    def moved(left, right):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), left, right)))

    assert moved(plain, start) > 1e-3
    # Adam divides by the root of squares, which makes much of rounding where gradients vanish.
    assert moved(plain, state.params) < 1e-5


def test_scores_are_those_of_per_row_autodiff(state, optimizer, step):
    """The decrease of the validation loss per share of a row in the update, by forward mode."""
    state = step(step(state, BATCHES[0], VAL)[0], BATCHES[1], VAL)[0]
    rows = testing.per_example_grads(ROW_LOSSES, state.params, BATCHES[2])
    val_grads = jax.grad(LOSS)(state.params, VAL)

    @jax.jit
    def decrease(row):
        def update(grads):
            return optimizer.update(grads, state.opt_state, state.params)[0]

        share = jax.tree.map(lambda leaf: leaf / NUM_TRAIN, row)
        moved = jax.jvp(update, (state.grads,), (share,))[1]
        # Bytes that have not occurred yet: 0 * inf, by definition zero.
        moved = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), moved)
        return -optax.tree.vdot(val_grads, moved)

    expected = [
        decrease(jax.tree.map(lambda leaf, row=row: leaf[row], rows)) for row in range(NUM_TRAIN)
    ]
    *_, scores = step(state, BATCHES[2], VAL)
    testing.assert_dots_close(scores, np.array(expected), rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_step_has_a_learning_rate(steps):
    rates = np.asarray(make_schedule(1e-2, steps)(jnp.arange(steps)))
    assert (rates > 0).all()
    np.testing.assert_allclose(rates.max(), 1e-2, rtol=1e-6)
    if steps > 1:
        np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-4)


def instead_of_steps(monkeypatch, *results):
    """Makes the steps return ``results`` (loss, val_loss, scores) without compiling anything."""

    def make_step(*args):
        return lambda state, train_rows, val_rows: (state, *results)

    monkeypatch.setattr("ghostjax.runs.training.make_step", make_step)
    monkeypatch.setattr("ghostjax.runs.training.init_params", lambda *args: {"w": jnp.zeros(1)})
    monkeypatch.setattr("ghostjax.runs.training.init_state", lambda *args: "a state")


def test_documents_and_windows_depend_on_the_seed_alone(micro_config, monkeypatch):
    instead_of_steps(monkeypatch, 1.0, 1.0, np.zeros(4))
    data = load_documents(micro_config)

    def drawn(seed):
        steps = train(dataclasses.replace(micro_config, seed=seed), *data)
        return [(visits.indices.tolist(), visits.starts.tolist()) for visits in steps]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_initial_parameters_depend_on_the_seed_alone():
    params = init_params(MODEL, LENGTH, seed=0)
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
    ids=["loss", "val_loss", "scores"],
)
def test_a_run_that_diverges_stops_with_an_error(micro_config, monkeypatch, results):
    instead_of_steps(monkeypatch, *results)
    steps = train(micro_config, *load_documents(micro_config))
    with pytest.raises(DivergedError, match=r"diverged at step 0 .*lower --learning-rate"):
        next(steps)
