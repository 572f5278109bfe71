"""The loop over steps: what is drawn, what stops it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax.runs.data.load import load_task
from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.training.optimizers import make_optimizer, make_schedule
from ghostjax.runs.training.step import StepRecord
from ghostjax.runs.training.trainer import Trainer, batches

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"w": jnp.ones(3)}


@pytest.fixture(scope="module")
def task(micro_config):
    return load_task(micro_config)


def test_batches_depend_on_the_seed_alone(micro_config, task):
    def drawn(seed):
        source = batches(dataclasses.replace(micro_config, seed=seed), task)
        return [next(source) for _ in range(4)]

    first, again, other = drawn(0), drawn(0), drawn(1)
    chex.assert_trees_all_equal(next(batches(micro_config, task, start=3)), first[3])
    chex.assert_trees_all_equal(first, again)
    assert any((one.indices != two.indices).any() for one, two in zip(first, other))
    assert first[0].val_rows["inputs"].shape == (2, 2, 1, 16)
    # The two validation sets are drawn from files of their own.
    assert (first[0].val_rows["inputs"][0] != first[0].val_rows["inputs"][1]).any()


@pytest.mark.slow
def test_initial_parameters_depend_on_the_seed_alone(task):
    params = task.init_params(0)
    chex.assert_trees_all_equal(task.init_params(0), params)
    other = task.init_params(1)["blocks"]["qkv"]["kernel"]
    assert not np.allclose(other, params["blocks"]["qkv"]["kernel"])


@pytest.mark.quick("2")
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_step_has_a_learning_rate(steps):
    rates = np.asarray(make_schedule(1e-2, steps)(jnp.arange(steps)))
    assert (rates > 0).all()
    np.testing.assert_allclose(rates.max(), 1e-2, rtol=1e-6)
    if steps > 1:
        np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        *("adamw", "sgd(momentum=0.9)", "adafactor", "lamb", "adamw(b2=0.95, weight_decay=0)"),
        *("contrib.ademamix(b3=0.99)", "contrib.prodigy", "contrib.schedule_free_adamw"),
    ],
)
def test_optimizers_of_optax_by_name(text):
    optimizer = make_optimizer(text, make_schedule(1e-2, 10), 1.0, PARAMS)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert jnp.abs(updates["w"]).min() > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamm", "optax has no optimizer 'adamm'"),
        ("clip", "optax has no optimizer 'clip' with a learning rate"),
        ("contrib.adamw", "optax has no optimizer 'contrib.adamw'"),
        ("contrib.other.muon", "expected a name, or a name with arguments"),
        ("nn.muon", "expected a name, or a name with arguments"),
        ("adam(beta=1)", "--optimizer adam: .*unexpected keyword argument 'beta'"),
        ("adam(learning_rate=1)", "the learning rate is set with --learning-rate"),
        ("adam(0.9)", "expected a name, or a name with arguments"),
        ("adam(b1=f())", "expected a name, or a name with arguments"),
        ("__import__('os')", "expected a name, or a name with arguments"),
        ("lion", "--optimizer lion: .*derivative zero"),
        ("polyak_sgd", "--optimizer"),
    ],
)
def test_optimizers_that_cannot_be_used(text, message):
    with pytest.raises(UsageError, match=message) as raised:
        make_optimizer(text, make_schedule(1e-2, 10), 1.0, PARAMS)
    assert "\n" not in str(raised.value)


def record(scores=None, steps=None):
    by_set, by_row = np.zeros(2, np.float32), np.zeros((2, 4), np.float32)
    scores = {"loss": np.ones(4, np.float32), "score": by_row, "error": by_row, **(scores or {})}
    found = {"loss": np.float32(1), "audit_error": np.full(2, np.nan, np.float32)}
    found |= dict.fromkeys(("val_loss", "predicted", "actual", "conservation_error"), by_set)
    return StepRecord(scores, {**found, **(steps or {})}, by_row)


def one_bad(value):
    scores = np.zeros((2, 4), np.float32)
    scores[1, 2] = value
    return scores


STOPS = {
    "loss": ({}, {"loss": np.float32(np.nan)}, "a validation loss is not finite"),
    "val_loss": ({}, {"val_loss": np.array([1, np.inf])}, "stopped at step 0: a validation loss"),
    "row": (
        {"loss": np.array([1, np.nan, 1, 1])},
        {"loss": np.float32(np.nan)},
        r"the loss or score of {1} is not finite; lower --learning-rate",
    ),
    "score": (
        {"score": one_bad(np.nan)},
        {},
        "the score, but not the loss, of {2} is not finite; the opt",
    ),
    "norm": (
        {"norm": np.array([1, 1, np.inf, 1])},
        {},
        "the norm of the gradient of {2} is not finite; lower --learning-rate",
    ),
    "all": ({"loss": np.full(4, np.inf)}, {}, "the loss or score of {0}, {1}, {2}, {3} is"),
}


def made(scores, steps):
    return lambda *args, **options: lambda state, *rows: (state, record(scores, steps))


@pytest.mark.quick("loss", "row", "score", "norm")
@pytest.mark.parametrize(("scores", "steps", "message"), STOPS.values(), ids=STOPS)
def test_what_stops_a_run(micro_config, task, monkeypatch, scores, steps, message):
    monkeypatch.setattr(
        "ghostjax.runs.training.trainer.make_step",
        made(scores, steps),
    )
    indices = next(batches(micro_config, task)).indices
    ids = [task.examples[index].id for index in indices]
    with pytest.raises(StoppedError, match=message.format(*ids)):
        next(Trainer(micro_config, task).steps("a state", 0))


FAULTS = {
    "certificate": ({"conservation_error": np.array([0, 0.02])}, "other: the conservation error"),
    "audit": ({"audit_error": np.array([1e-6, 0.02])}, "other: the audit error is 2.0e-02, more"),
    "audit of the first set": ({"audit_error": np.array([np.inf, 0])}, "held: the audit error is"),
    "nothing": ({"audit_error": np.array([9e-4, 0])}, None),
}


@pytest.mark.quick("audit of the first set")
@pytest.mark.parametrize(("steps", "message"), FAULTS.values(), ids=FAULTS)
def test_what_stops_a_run_after_the_step_is_logged(micro_config, task, monkeypatch, steps, message):
    monkeypatch.setattr("ghostjax.runs.training.trainer.make_step", made({}, steps))
    _, step = next(Trainer(micro_config, task).steps("a state", 0))
    if message is None:
        assert step.fault is None
    else:
        assert step.fault.startswith(f"stopped at step 0, validation set {message}")
        assert step.fault.endswith("more than the tolerance 1.0e-03; the log has the step")


@pytest.mark.slow
def test_audits_are_at_their_steps_and_of_different_rows(micro_config, task):
    config = dataclasses.replace(micro_config, audit_every=3, batch_size=4)
    trainer = Trainer(config, task)
    audited = [trainer._audited(number) for number in range(31)]
    assert [n for n, rows in enumerate(audited) if rows is not None] == list(range(0, 31, 3))
    assert all(0 <= row < 4 for rows in audited[::3] for row in rows)
    assert len({tuple(rows) for rows in audited[::3]}) > 3
    never = Trainer(dataclasses.replace(config, audit_every=0), task)
    assert all(never._audited(number) is None for number in range(4))
    # Of every second step, every third.
    some = Trainer(dataclasses.replace(config, score_every=2), task)
    assert [n for n in range(14) if some._audited(n) is not None] == [1, 7, 13]


@pytest.mark.quick("2")
@pytest.mark.parametrize("microbatches", [1, 2])
def test_norms_are_those_of_the_gradients_of_rows_alone(micro_config, task, microbatches):
    config = dataclasses.replace(
        micro_config, norms=True, steps=4, score_every=2, microbatches=microbatches
    )
    trainer = Trainer(config, task)

    @jax.jit
    def expected(params, rows):
        def of_row(row):
            one = jax.tree.map(lambda leaf: leaf[None], row)
            grads = jax.grad(lambda params: task.row_losses(params, one)[0])(params)
            return optax.tree.norm(grads)

        return jax.lax.map(of_row, rows)

    first = trainer.init_state(task.init_params(0))
    before = [jax.tree.map(jnp.copy, first.params)]
    for state, step in trainer.steps(first, 0):
        if step.number % 2:
            norms = expected(before[-1], step.batch.train_rows)
            np.testing.assert_allclose(step.record.scores["norm"], norms, rtol=1e-5)
        else:
            assert "norm" not in step.record.scores
        before.append(jax.tree.map(jnp.copy, state.params))
    assert len(before) == 5


def test_kinds_of_layers(micro_config, task):
    assert Trainer(micro_config, task).kinds == ["LayerNorm", "attention", "MLP", "embedding"]


@pytest.mark.slow
def test_parameters_in_float32_whatever_is_computed_in(micro_config):
    config = dataclasses.replace(micro_config, dtype="bfloat16", remat=True, order=2)
    task = load_task(config)
    params = task.init_params(0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    state = Trainer(config, task).init_state(params)
    _, step = next(Trainer(config, task).steps(state, 0))
    assert np.isfinite(step.record.scores["score"]).all()
    assert step.record.steps["conservation_error"].max() < 0.03
    assert step.record.scores["loss"].dtype == np.float32
