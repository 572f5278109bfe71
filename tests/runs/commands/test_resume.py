"""How a run stops and goes on: signals, full disks, other directories, more steps."""

import dataclasses
import errno
import os
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax.runs.commands import train
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.errors import StoppedError, TerminatedError, UsageError
from ghostjax.runs.store import checkpoints, schema
from ghostjax.runs.store.run import read_run
from ghostjax.runs.training.placement import ONE_DEVICE
from ghostjax.runs.training.step import StepRecord
from ghostjax.runs.training.trainer import Step, Trainer, batches
from tests.runs.conftest import BATCH_SIZE, STEPS

FULL = r"cannot write .*: No space left on device; make room, then "


class FakeTrainer(Trainer):
    """Makes steps without a model: what training writes and how it stops is the same."""

    def __init__(self, config, task, params=None, placement=ONE_DEVICE):
        self._config, self._task, self.kinds = config, task, ["MLP"]
        self._placement = placement

    def init_state(self, params):
        return {"w": jnp.zeros(3)}

    def steps(self, state, start):
        rng = np.random.default_rng(7)
        numbers = rng.standard_normal((1000, 2, self._config.batch_size)).astype(np.float32)
        for number, batch in zip(range(start, self._config.steps), self._batches(start)):
            names = [field.name for field in schema.table_schema("steps", ["a"])]
            by_step = {name: numbers[number, 0, 0] for name in names if name.endswith("error")}
            by_step |= {name[:-2]: numbers[number, :, 0] for name in names if name.endswith("_a")}
            by_step |= {"loss": numbers[number, 0, 0], "undefined": np.int64(0)}
            rows = {"loss": numbers[number, 0], "score": numbers[number]}
            record = StepRecord({**rows, "error": abs(numbers[number])}, by_step, np.ones((2, 1)))
            state = {"w": state["w"] + 1}
            yield state, Step(number, 0.1, batch, record)

    def _batches(self, start):
        return batches(self._config, self._task, start)


@pytest.fixture
def fake(micro_config, tmp_path, monkeypatch):
    """A configuration of a run that trains nothing, and so takes no time."""
    monkeypatch.setattr(train, "Trainer", FakeTrainer)
    return dataclasses.replace(micro_config, out=tmp_path / "run", checkpoint_every=2)


@pytest.mark.quick("Ctrl-C")
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_signals_save_the_step_at_hand(fake, monkeypatch, not_ignored, number, error):
    with monkeypatch.context() as patch:
        patch.setattr(FakeTrainer, "_batches", signalling(FakeTrainer._batches, 3, number))
        with pytest.raises(error) as raised:
            train.run(fake)
    assert type(raised.value) is error
    assert (read_run(fake.out).end, checkpoints.latest(fake.out)) == (3, 3)
    train.run(dataclasses.replace(fake, resume=True))
    assert read_run(fake.out).end == STEPS


def signalling(draw, step, number):
    """Batches, with a signal before the last of the first ``step``."""

    def drawn(self, start):
        for n, batch in enumerate(draw(self, start), start=start):
            if n == step - 1:
                os.kill(os.getpid(), number)
            yield batch

    return drawn


def full_disk(call):
    """``os.fsync`` of a disk that is full from its call of this number on."""
    left, sync = [call], os.fsync

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
        sync(descriptor)

    return fsync


def test_a_full_disk_at_any_moment_leaves_a_run_that_goes_on(fake, monkeypatch):
    whole = dataclasses.replace(fake, out=fake.out.parent / "whole")
    train.run(whole)
    expected = read_run(whole.out)
    for call in (0, 2, 3, 7, 12, 17, 25, 40, 60):
        out = fake.out.parent / f"full{call}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_disk(call))
            with pytest.raises(StoppedError, match=FULL):
                train.run(dataclasses.replace(fake, out=out))
        assert not list(out.rglob("*.partial*"))
        begun = (out / "run.json").exists()
        train.run(dataclasses.replace(fake, out=out, resume=begun))
        for table in schema.LOG_TABLES:
            assert getattr(read_run(out), table).equals(getattr(expected, table)), table
        assert read_run(out).is_finished


def test_a_full_disk_under_orbax_is_told_like_any_other(fake, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.Checkpointer.save", refuse)
        with pytest.raises(StoppedError, match=FULL):
            train.run(fake)
    assert read_run(fake.out).end == 2
    train.run(dataclasses.replace(fake, resume=True))


def test_checkpoints_of_another_run_are_refused(fake):
    other = dataclasses.replace(fake, out=fake.out.parent / "other")
    for config in (fake, other):
        train.run(config)
        (config.out / "summary.json").unlink()
    shutil.rmtree(fake.out / "checkpoints")
    shutil.copytree(other.out / "checkpoints", fake.out / "checkpoints")
    with pytest.raises(UsageError, match="is of another run: run is "):
        train.run(dataclasses.replace(fake, resume=True))
    shutil.rmtree(fake.out / "checkpoints")
    with pytest.raises(UsageError, match="has steps 0 to 5 in its log but no checkpoint of them"):
        train.run(dataclasses.replace(fake, resume=True))
    assert read_run(fake.out).end == STEPS


def test_a_resumed_run_tells_which_steps_are_made_again(fake, capsys):
    train.run(fake)
    (fake.out / "summary.json").unlink()
    shutil.rmtree(fake.out / "checkpoints" / "6")
    train.run(dataclasses.replace(fake, resume=True, quiet=False))
    assert "Steps 4 to 5 had no checkpoint and are made again" in capsys.readouterr().err


def test_steps_make_a_complete_run_longer(fake):
    train.run(fake)
    longer = TrainConfig(fake.out, resume=True, steps=STEPS + 3, quiet=True)
    before = read_run(fake.out).scores
    train.run(longer, {"steps"})
    run = read_run(fake.out)
    assert (run.end, run.summary["steps"]) == (STEPS + 3, STEPS + 3)
    assert run.scores.slice(0, len(before)).equals(before)
    assert run.metadata["options"]["steps"] == STEPS + 3
    assert run.metadata["lengths"] == [{"at": STEPS, "from": STEPS, "to": STEPS + 3}]
    whole = dataclasses.replace(fake, out=fake.out.parent / "whole", steps=STEPS + 3)
    train.run(whole)
    assert read_run(whole.out).scores["id"].equals(run.scores["id"])
    with pytest.raises(UsageError, match="complete run of 9 steps: there is nothing to resume; --"):
        train.run(dataclasses.replace(longer, steps=4), {"steps"})
    (fake.out / "summary.json").unlink()
    with pytest.raises(UsageError, match="--steps 4: the run has made 9 steps already"):
        train.run(dataclasses.replace(longer, steps=4), {"steps"})


def test_what_was_given_is_not_what_differs_from_a_default(fake):
    """An option that is given as by default is a change where the run has another."""
    train.run(fake)
    options = read_run(fake.out).metadata["options"]
    plain = TrainConfig(fake.out, resume=True)
    assert plain.resumed(options, set()).batch_size == BATCH_SIZE
    with pytest.raises(UsageError, match=r"it has --batch-size 4, not 16"):
        plain.resumed(options, {"batch_size"})
    with pytest.raises(UsageError, match=r"it has --steps 6|complete run of 6 steps"):
        train.run(dataclasses.replace(plain, steps=6), {"steps"})
    assert plain.resumed(options, {"steps"}).steps == plain.steps == 512


@pytest.mark.slow
def test_a_run_goes_on_from_another_directory(fake, tmp_path, monkeypatch):
    data = fake.train[0].parent
    monkeypatch.chdir(data)
    train_paths = tuple(path.relative_to(data) for path in fake.train)
    val = tuple(text.replace(f"{data}/", "") for text in fake.val)
    relative = dataclasses.replace(fake, train=train_paths, val=val)
    train.run(relative)
    monkeypatch.chdir(tmp_path)
    out = fake.out.relative_to(tmp_path)
    longer = TrainConfig(out, resume=True, steps=STEPS + 1, quiet=True)
    train.run(longer, {"steps"})
    assert read_run(fake.out).end == STEPS + 1
    # Given once more, they are those of the run, wherever that is.
    monkeypatch.chdir(data)
    options = read_run(fake.out).metadata["options"]
    relative.resumed(options, {"train", "val"})


def test_short_documents_are_told_once_and_counted(fake, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(['{"text": ""}', '{"text": "long enough"}', '{"text": "x"}']))
    config = dataclasses.replace(fake, train=(*fake.train, more), quiet=False)
    train.run(config)
    line = f"Skipped 2 documents that are empty or too short: {more}, line 1, {more}, line 3"
    assert capsys.readouterr().err.replace("\n", " ").count(line) == 1
    run = read_run(fake.out)
    assert run.metadata["skipped"] == 2
    assert run.examples["id"].to_pylist()[-1] == "more:1"
    train.run(dataclasses.replace(config, resume=True, steps=STEPS + 1), {"steps"})
    assert "Skipped" not in capsys.readouterr().err
