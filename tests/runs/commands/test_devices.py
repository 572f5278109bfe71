"""A run on many devices: its log is that of one device, whatever it was resumed on."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

import ghostjax
from ghostjax.runs.commands import train
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.run import read_run
from ghostjax.runs.store.schema import LOG_TABLES
from ghostjax.runs.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Sums over rows are made in another order: a rounding of 2**-24 each, of sums of up to some hundred
# numbers whose errors add up as a random walk, over four steps. Of the largest number in a column.
TOLERANCE = 1e-5
ROUNDING = ("conservation_error", "audit_error")  # nothing else, so that only their size is checked


@pytest.fixture(scope="module")
def config(micro_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("devices") / "one"
    lines = "\n\n".join(f"{n} of many held out texts, each one of a length" for n in range(8))
    held, other = (out.parent / f"{name}.txt" for name in ("held", "other"))
    held.write_text(lines)
    other.write_text(lines.replace("a", "e"))
    return dataclasses.replace(
        micro_config,
        out=out,
        val=(f"held={held}", f"other={other}"),
        steps=4,
        batch_size=8,
        val_batch_size=8,
        checkpoint_every=2,
        # Adam's derivative at its first step is what cancellation leaves, and so is not compared.
        optimizer="sgd(momentum=0.9)",
        learning_rate=0.1,
        order=2,
    )


@pytest.fixture(scope="module")
def one(config):
    with jax.numpy_dtype_promotion("standard"):
        train.run(config)
    return read_run(config.out)


def assert_same_log(found, expected):
    for table in LOG_TABLES:
        mine, theirs = getattr(found, table), getattr(expected, table)
        assert mine.schema == theirs.schema
        for name, kind in zip(mine.column_names, mine.schema.types):
            if str(kind) in ("string", "int64"):
                assert mine[name].equals(theirs[name]), name
                continue
            numbers, wanted = (run.numbers(table, name) for run in (found, expected))
            if np.isnan(wanted).all():  # it was not asked for
                assert np.isnan(numbers).all(), name
                continue
            if name.startswith(ROUNDING):
                assert np.nanmax(numbers) < 1e-4
                wanted = np.where(np.isnan(wanted), np.nan, numbers)
            atol = TOLERANCE * np.nanmax(abs(wanted))
            if name.startswith("actual"):  # a difference of losses, whose roundings stay
                losses = expected.numbers(table, name.replace("actual", "val_loss"))
                atol += 2**-23 * np.nanmax(losses)
            np.testing.assert_allclose(numbers, wanted, rtol=0, atol=atol, err_msg=name)


def assert_same_values(found, expected):
    for name in expected.sets:
        mine, theirs = found.summary["domains"][name], expected.summary["domains"][name]
        for domain, figures in theirs.items():
            assert mine[domain]["visits"] == figures["visits"]
            np.testing.assert_allclose(mine[domain]["value"], figures["value"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4", "data=2,model=2"])
def test_the_log_is_that_of_one_device(config, one, tmp_path, mesh):
    train.run(dataclasses.replace(config, out=tmp_path / "run", mesh=mesh))
    run = read_run(tmp_path / "run")
    assert_same_log(run, one)
    assert_same_values(run, one)
    sizes = {"data=4": "data=4,model=1"}.get(mesh, mesh)
    about = {"at": 0, "mesh": sizes, "fsdp": False, "kind": "cpu", "processes": 1}
    assert run.metadata["devices"] == [about]
    assert "nan" not in make_report(run).lower().replace("provenance", "")


def interrupt(monkeypatch, step):
    make = Trainer.steps

    def interrupted(self, *args):
        for state, made in make(self, *args):
            if made.number + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            yield state, made

    monkeypatch.setattr(Trainer, "steps", interrupted)


@pytest.mark.slow
@pytest.mark.usefixtures("not_ignored")
def test_a_run_goes_on_with_fewer_devices(config, one, tmp_path, monkeypatch):
    again = dataclasses.replace(config, out=tmp_path / "run", resume=True)
    begun = dataclasses.replace(again, resume=False, mesh="data=4,model=2", fsdp=True)
    states = []
    make = Trainer.steps

    def watched(self, state, start):
        states.append(state.params["blocks"]["up"]["kernel"].sharding)
        yield from make(self, state, start)

    monkeypatch.setattr(Trainer, "steps", watched)
    for step, options in ((1, begun), (3, dataclasses.replace(again, mesh="data=2", fsdp=True))):
        with monkeypatch.context() as patch:
            interrupt(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train.run(options, {"mesh", "fsdp"})
    train.run(dataclasses.replace(again, mesh="data=1"), {"mesh"})
    assert [len(place.device_set) for place in states] == [8, 2, 1]
    assert [place.is_fully_replicated for place in states] == [False, False, True]
    run = read_run(again.out)
    assert_same_log(run, one)
    assert_same_values(run, one)
    devices = [(each["at"], each["mesh"]) for each in run.metadata["devices"]]
    assert devices == [(0, "data=4,model=2"), (1, "data=2,model=1"), (3, "data=1,model=1")]
    assert run.metadata["options"]["mesh"] == "data=1"


def make_task():
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    rows = [{"x": x, "y": y} for x, y in zip(rng.normal(size=(32, 8)), rng.normal(size=32))]

    def init(seed):
        return {"in": jax.random.normal(jax.random.key(seed), (8, 16)) / 4, "out": jnp.zeros(16)}

    def row_losses(params, batch):
        hidden = jnp.tanh(batch["x"].astype(jnp.float32) @ params["in"])
        return (hidden @ params["out"] - batch["y"]) ** 2

    return ghostjax.Task(rows[:16], {"val": rows[16:]}, init, row_losses)


def test_tasks_of_ones_own_are_split_too(tmp_path):
    options = {"steps": 4, "batch_size": 8, "val_batch_size": 8, "optimizer": "sgd", "quiet": True}
    options["norms"] = True
    ghostjax.run(make_task, tmp_path / "one", mesh="data=1", **options)
    ghostjax.run(make_task, tmp_path / "four", mesh="data=4", fsdp=True, microbatches=2, **options)
    assert_same_log(read_run(tmp_path / "four"), read_run(tmp_path / "one"))
    more = {"resume": True, "quiet": True, "steps": 5}
    ghostjax.run(make_task, tmp_path / "four", mesh="data=2", **more)
    ghostjax.run(make_task, tmp_path / "one", **more)
    assert_same_log(read_run(tmp_path / "four"), read_run(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.usefixtures("not_ignored")
def test_the_same_devices_give_the_same_bits(tmp_path, monkeypatch):
    options = {"steps": 6, "batch_size": 8, "val_batch_size": 8, "quiet": True}
    split = {"mesh": "data=4", "fsdp": True, **options}
    ghostjax.run(make_task, tmp_path / "whole", **split)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ghostjax.run(make_task, tmp_path / "run", **split)
    ghostjax.run(make_task, tmp_path / "run", resume=True, quiet=True)
    run, whole = read_run(tmp_path / "run"), read_run(tmp_path / "whole")
    assert run.metadata["devices"] == whole.metadata["devices"]
    for table in LOG_TABLES:
        assert getattr(run, table).equals(getattr(whole, table)), table
