"""Values against real retraining: what is left out, what is compared, and that work is kept."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax.cli import main
from ghostjax.runs.analysis.statistics import spearman
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.commands import train
from ghostjax.runs.commands.sources import initial_params, read_task
from ghostjax.runs.data.batches import generator
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.files import read_json, write_json
from ghostjax.runs.store.fingerprint import fingerprint
from ghostjax.runs.store.run import read_run
from ghostjax.runs.training.retraining import Retraining
from ghostjax.runs.training.trainer import Trainer, batches
from tests.runs.checks import fails
from tests.runs.conftest import STEPS
from tests.runs.made_up import write_run

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def path(micro_run, tmp_path_factory):
    """A copy, to be written to."""
    return shutil.copytree(micro_run.path, tmp_path_factory.mktemp("validate") / "run")


def validated(path, capsys, *options):
    assert main(["validate", str(path), *map(str, options)]) == 0
    return capsys.readouterr()


def test_scores_compare_sums_of_values_with_retraining_and_are_kept(path, capsys, monkeypatch):
    out, err = validated(path, capsys, "--subsets", "4", "--json")
    assert "5 retrainings of 6 steps, about " in err
    assert "retraining 5/5 took " in err
    found = json.loads(out)["sets"]
    values = read_values(read_run(path))
    rng = np.random.default_rng([0, 0])
    first = rng.choice(10, 5, replace=False)
    for name, own in found.items():
        assert len(own["predicted"]) == len(own["actual"]) == 4
        expected = np.nan_to_num(values[name].values)[first].sum()
        assert own["predicted"][0] == pytest.approx(expected, rel=1e-6)
        assert own["spearman"] == pytest.approx(spearman(*map(np.array, own_pair(own))))
        low, high = own["interval"]
        assert low <= own["spearman"] <= high

    # Again, with two more: the five are read.
    monkeypatch.setattr(Retraining, "seconds", lambda self: 1.0)
    out, err = validated(path, capsys, "--subsets", "6", "--json")
    assert "2 retrainings of 6 steps, about 2.0 s, 5 are done" in err
    again = json.loads(out)["sets"]
    for name, own in found.items():
        assert again[name]["actual"][:4] == own["actual"]

    out, err = validated(path, capsys, "--subsets", "6", "--quiet")
    assert err == ""
    assert "over 6 subsets of 50% of the examples, rank correlation " in out
    assert "so 6 subsets do not show" in out or "rank subsets " in out

    kept = next((path / "validate").iterdir())
    write_json(kept, {**read_json(kept), "run": "another"})
    message = fails(["validate", path, "--subsets", "6", "--quiet"], capsys)
    assert f"{kept} is of another run: delete it" in message


@pytest.mark.slow
def test_a_run_from_given_weights_is_retrained_from_them(micro_config, micro_run, tmp_path, capsys):
    weights = micro_run.path / "checkpoints" / str(STEPS)
    train.run(dataclasses.replace(micro_config, out=tmp_path / "run", init_from=weights))
    done = read_run(tmp_path / "run")
    config, task = read_task(done)
    assert fingerprint(initial_params(config, task)) != fingerprint(task.init_params(config.seed))
    found = json.loads(validated(done.path, capsys, "--subsets", "4", "--json")[0])["sets"]
    retraining = Retraining(config, task, lambda: initial_params(config, task))
    like = Trainer(config, task).init_state(initial_params(config, task))
    state = checkpoints.restore(done.path, STEPS, like, done.identity)
    for name, loss in zip(retraining.sets, retraining._val_losses(state.params)):
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-5)  # nothing is left out


def test_validation_rows_are_read_a_batch_at_a_time(micro_run, monkeypatch):
    config, task = read_task(micro_run)
    again = Retraining(config, task, lambda: task.init_params(0))
    params, size, read, counts = task.init_params(0), config.val_batch_size, task.val_rows, []
    monkeypatch.setattr(task, "val_rows", lambda *args: counts.append(len(args[1])) or read(*args))
    found = again._val_losses(params)
    assert counts == [2, 2, 2, 1]  # of four examples, and of three
    for name, loss in zip(again.sets, found):
        count = task.val_sizes[name]
        rows = read(name, np.arange(count), generator(config.seed, f"retraining {name}", 0))
        places = np.minimum(np.arange(4).reshape(-1, size), count - 1)
        losses = [
            again._row_losses(params, {key: leaf[own] for key, leaf in rows.items()})
            for own in places
        ]
        assert loss == np.concatenate(losses)[:count].astype(np.float64).mean()


def own_pair(own):
    return own["predicted"], own["actual"]


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_retraining_is_the_run_without_the_shares_of_what_is_left_out(micro_run, microbatches):
    config, task = read_task(micro_run)
    config = dataclasses.replace(config, microbatches=microbatches)
    left_out = np.arange(len(task.examples)) % 3 == 0

    def init():
        return task.init_params(config.seed)

    found = Retraining(config, task, init).losses_without(left_out)

    optimizer = Trainer(config, task).optimizer
    params = task.init_params(config.seed)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, rows, weights):
        def loss(params):
            return jnp.sum(weights * task.row_losses(params, rows)) / config.batch_size

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _, batch in zip(range(config.steps), batches(config, task)):
        weights = jnp.float32(~left_out[batch.indices])
        params, state = step(params, state, batch.train_rows, weights)
    expected = Retraining(config, task, init)._val_losses(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    whole = Retraining(config, task, init).losses_without(left_out & False)
    assert np.abs(found - whole).min() > 1e-5


BAD = {
    "subsets": (["--subsets", "3"], "--subsets must be at least 4, got 3"),
    "fraction": (["--fraction", "1"], "--fraction must be between 0 and 1, got 1"),
    "seed": (["--seed", "-1"], "--seed must be at least 0, got -1"),
    "few": (["--fraction", "0.01"], "--fraction 0.01 of 10 examples leaves out 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_used(path, capsys, options, message):
    assert message in fails(["validate", path, *options], capsys)


def test_runs_that_cannot_be_used(path, tmp_path, capsys, monkeypatch):
    unfinished = write_run(tmp_path / "run", finished=False)
    assert "is not over: go on with it by ghostjax train" in fails(["validate", unfinished], capsys)
    monkeypatch.setattr("ghostjax.runs.commands.validate.fingerprint", lambda tree: "other")
    message = fails(["validate", path], capsys)
    assert "the initial parameters are not those the run began with" in message
