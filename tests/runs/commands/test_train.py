"""A whole run on disk: what it writes, and that an interrupted one goes on undisturbed."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from ghostjax.runs.analysis.summary import measure_fidelity, run_warnings
from ghostjax.runs.analysis.values import read_values, sum_visits
from ghostjax.runs.commands import train
from ghostjax.runs.commands.signals import noted
from ghostjax.runs.data.load import load_task
from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store import checkpoints, files
from ghostjax.runs.store.fingerprint import fingerprint
from ghostjax.runs.store.run import read_run
from ghostjax.runs.store.schema import LOG_TABLES
from ghostjax.runs.training.trainer import Trainer
from tests.runs.conftest import BATCH_SIZE, LENGTH, STEPS

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def same_log(one, other):
    for table in LOG_TABLES:
        assert getattr(one, table).equals(getattr(other, table)), table


def test_the_run_directory_holds_what_is_documented(micro_run):
    names = {path.name for path in micro_run.path.iterdir()}
    assert names == {
        *("run.json", "examples.parquet", "log", "checkpoints", "values.parquet", "summary.json")
    }
    assert len(micro_run.scores) == STEPS * BATCH_SIZE
    assert micro_run.sets == ("held", "other")
    assert sorted(path.name for path in (micro_run.path / "log").glob("scores*")) == [
        "scores-00000000-00000004.parquet",
        "scores-00000004-00000006.parquet",
    ]


def test_the_log_says_what_happened(micro_run):
    scores, steps = micro_run.scores.to_pydict(), micro_run.steps.to_pydict()
    for name in micro_run.sets:
        assert any(score != 0 for score in scores[f"score_{name}"])
        assert all(error >= 0 for error in scores[f"error_{name}"])
    by_step = np.reshape(scores["loss"], (STEPS, BATCH_SIZE)).mean(axis=1)
    np.testing.assert_allclose(by_step, steps["loss"], rtol=1e-5)
    for name in micro_run.sets:
        audits = steps[f"audit_error_{name}"]
        assert [error is None for error in audits] == [False, True] * 3
        assert max(error for error in audits if error is not None) < 1e-3
        assert max(steps[f"conservation_error_{name}"]) < 1e-3
    assert min(steps["learning_rate"]) > 0
    starts = dict(zip(*(micro_run.examples[name].to_pylist() for name in ("id", "size"))))
    for start, name in zip(scores["start"], scores["id"]):
        assert 0 <= start <= max(0, starts[name] - (LENGTH + 1))
    assert any(scores["start"])


def test_kinds_add_up_to_the_size_of_the_scores(micro_run):
    kinds, scores = micro_run.kinds, micro_run.scores
    step, which, part = (kinds[name].to_numpy() for name in ("step", "set", "score"))
    for name in micro_run.sets:
        by_step = scores[f"score_{name}"].to_numpy().reshape(STEPS, BATCH_SIZE)
        found = [part[(step == number) & (which == name)].sum() for number in range(STEPS)]
        np.testing.assert_allclose(found, np.abs(by_step).sum(axis=1), rtol=1e-3)


def test_values_are_the_sums_of_the_log(micro_run):
    table = pq.read_table(micro_run.path / "values.parquet").to_pydict()
    visits, values, errors, _ = sum_visits(micro_run)
    assert table["visits"] == visits.tolist()
    assert table["value_other"] == values[:, 1].tolist()
    assert table["error_held"] == errors[:, 0].tolist()
    assert visits.max() - visits.min() <= 1


def test_the_summary_agrees_with_the_tables(micro_run):
    summary = micro_run.summary
    assert summary["finished"] is True
    assert summary["steps"] == STEPS
    assert summary["loss"] == micro_run.steps["loss"][-1].as_py()
    assert summary["auc"] is None
    values = sum_visits(micro_run).values
    for k, name in enumerate(micro_run.sets):
        domains = summary["domains"][name]
        assert set(domains) == {"forum", "wiki"}
        total = sum(figures["value"] for figures in domains.values())
        np.testing.assert_allclose(total, values[:, k].sum(), rtol=1e-9)
        assert sum(figures["visits"] for figures in domains.values()) == STEPS * BATCH_SIZE
        assert summary["fidelity"][name]["conservation_error"] < 1e-3


def test_run_json_tells_how_the_run_was_started(micro_config, micro_run):
    metadata = micro_run.metadata
    assert metadata["options"]["steps"] == STEPS
    assert metadata["seed"] == 0
    assert len(metadata["fingerprints"]["data"]) == 64
    assert {"jax", "flax", "optax", "ghostjax", "python"} <= set(metadata["versions"])
    assert micro_config.resumed(metadata["options"]) == micro_config


def test_the_readme_reads_the_log_with_sql(micro_run, monkeypatch):
    readme = (pathlib.Path(__file__).parents[3] / "README.md").read_text()
    (query,) = re.findall(r"^```sql\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    query = query.replace("runs/first", str(micro_run.path)).replace("prose", "held")
    found = dict(duckdb.sql(query).fetchall())
    values = sum_visits(micro_run).values
    expected = dict(zip(micro_run.examples["id"].to_pylist(), values[:, 0]))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9)


def interrupted_after(monkeypatch, steps):
    """Sends the process what Ctrl-C does while step ``steps`` is under way."""
    make = Trainer.steps

    def interrupted(self, *args):
        for state, step in make(self, *args):
            if step.number + 1 == steps:
                os.kill(os.getpid(), signal.SIGINT)
            yield state, step

    monkeypatch.setattr(Trainer, "steps", interrupted)


@pytest.mark.usefixtures("not_ignored")
def test_ctrl_c_leaves_a_run_that_goes_on(micro_config, micro_run, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(micro_config, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)
    assert read_run(config.out).end == 3
    assert read_run(config.out).summary is None
    started = files.read_json(config.out / "run.json")
    now, started["versions"]["jax"] = started["versions"]["jax"], "0.0.1"
    files.write_json(config.out / "run.json", started)
    train.run(dataclasses.replace(config, resume=True, quiet=False))
    assert f"Versions changed since the run began: jax {now} (was 0.0.1)" in capsys.readouterr().err
    same_log(read_run(config.out), micro_run)
    with pytest.raises(UsageError, match="complete run of 6 steps: there is nothing to resume"):
        train.run(dataclasses.replace(config, resume=True))


def test_one_process_at_a_time(micro_config, micro_run, tmp_path):
    (tmp_path / "run.json").write_text((micro_run.path / "run.json").read_text())
    config = dataclasses.replace(micro_config, out=tmp_path, resume=True)
    with files.lock(tmp_path), pytest.raises(UsageError, match="another process is writing"):
        train.run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]
    with files.lock(tmp_path):
        pass


@pytest.mark.slow
def test_a_run_that_stops_keeps_what_it_has(micro_config, tmp_path, monkeypatch):
    config = dataclasses.replace(micro_config, out=tmp_path / "run")
    check = Trainer._check

    def stop(self, step):
        check(self, step)
        if step.number == 5:
            raise StoppedError("stopped at step 5")

    monkeypatch.setattr(Trainer, "_check", stop)
    with pytest.raises(StoppedError):
        train.run(config)
    assert read_run(config.out).end == 5
    assert read_run(config.out).summary is None


def test_a_broken_certificate_is_in_the_log(micro_config, tmp_path, monkeypatch):
    config = dataclasses.replace(micro_config, out=tmp_path / "run")
    make = Trainer.steps

    def broken(self, *args):
        for state, step in make(self, *args):
            if step.number == 5:
                step.record.steps["conservation_error"] = np.float32([0, 0.25])
                step = dataclasses.replace(step, fault=self._fault(step))
            yield state, step

    monkeypatch.setattr(Trainer, "steps", broken)
    line = "step 5, validation set other: the conservation error is 2.5e-01, more than"
    with pytest.raises(StoppedError, match=f"stopped at {line} the tolerance 1.0e-03; the log has"):
        train.run(config)
    done = read_run(config.out)
    assert (done.end, done.summary) == (6, None)
    # Not of the broken step: resuming makes it again.
    assert checkpoints.latest(config.out) == 4
    assert any(f"Broken at {line}" in warning for warning in all_warnings(done))


def all_warnings(done):
    measured = {name: measure_fidelity(done, name, own) for name, own in read_values(done).items()}
    return run_warnings(done, measured)


@pytest.mark.usefixtures("not_ignored")
def test_some_steps_are_scored(micro_config, micro_run, tmp_path, monkeypatch):
    config = dataclasses.replace(micro_config, out=tmp_path / "run", score_every=2, norms=True)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)
    train.run(dataclasses.replace(config, resume=True, score_every=1))
    done = read_run(config.out)
    assert done.scored.tolist() == [False, True] * 3
    assert done.summary["scored_steps"] == 3
    # The same training, whose losses are all there.
    for table in ("scores", "steps"):
        losses = done.numbers(table, "loss")
        np.testing.assert_allclose(losses, micro_run.numbers(table, "loss"), rtol=1e-3)
    for column in ("score_held", "norm"):
        by_step = np.reshape(done.numbers("scores", column), (STEPS, BATCH_SIZE))
        assert np.isfinite(by_step).all(1).tolist() == [False, True] * 3
        assert np.isnan(by_step).all(1).tolist() == [True, False] * 3
    assert micro_run.scores["norm"].null_count == STEPS * BATCH_SIZE
    for column in ("val_loss", "predicted", "actual", "conservation_error"):
        assert done.steps[f"{column}_held"].null_count == 3
    for column in ("audit_error", "correlation"):  # at every other one that was scored
        is_there = np.isfinite(done.numbers("steps", f"{column}_held"))
        assert is_there.tolist() == [False, True, False, False, False, True]
    assert sorted(set(done.kinds["step"].to_pylist())) == [1, 3, 5]
    visits, values, _, _ = sum_visits(done)
    assert visits.sum() == 3 * BATCH_SIZE
    assert np.isnan(values).all(1).tolist() == (visits == 0).tolist()
    assert done.summary["val_loss"]["held"] == done.steps["val_loss_held"][5].as_py()
    assert done.summary["fidelity"]["held"]["steps"] == 3
    assert done.summary["fidelity"]["held"]["undefined_steps"] == 0
    for page in (make_report(done), make_report(dataclasses.replace(done, end=2))):
        assert "nan" not in page.lower().replace("provenance", "")
    assert not any("not finite" in line or "Broken" in line for line in all_warnings(done))


def test_resuming_checks_that_nothing_changed(micro_config, micro_run, tmp_path):
    config = dataclasses.replace(micro_config, out=tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"no run|run\.json"):
        train.run(config)
    (tmp_path / "run.json").write_text((micro_run.path / "run.json").read_text())
    with pytest.raises(UsageError, match="it has --batch-size 4, not 3"):
        train.run(dataclasses.replace(config, batch_size=3))
    metadata = files.read_json(tmp_path / "run.json")
    metadata["fingerprints"]["data"] = "0" * 64
    files.write_json(tmp_path / "run.json", metadata)
    with pytest.raises(UsageError, match="the data changed since the run began"):
        train.run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_documents_that_move_between_validation_sets_are_a_change(micro_config, write_data):
    contents = [
        ("one of\n\nthe other\n\nhere", "two of\n\nthem"),
        ("one of\n\nthe other", "here\n\ntwo of\n\nthem"),
    ]
    found = set()
    for held, other in contents:
        paths = write_data(held_txt=held, other_txt=other)
        val = (f"held={paths['held_txt']}", f"other={paths['other_txt']}")
        task = load_task(dataclasses.replace(micro_config, val=val))
        found.add(fingerprint(task.contents()))
    assert len(found) == 2


def test_a_run_json_without_options_is_refused_in_one_line(micro_config, tmp_path):
    (tmp_path / "run.json").write_text('{"schema_version": 1, "sets": ["val"]}')
    with pytest.raises(UsageError, match=r"run\.json: no id and options and fingerprints in it"):
        train.run(dataclasses.replace(micro_config, out=tmp_path, resume=True))


def test_a_run_that_is_to_ignore_ctrl_c_does():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert not received()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_kill_9_at_any_moment(micro_config, tmp_path):
    """The log of a run killed again and again equals that of an undisturbed one, row for row."""

    def command(out, *more):
        argv = ["train", "--out", str(out), "--model", "micro", "--quiet", "--length", str(LENGTH)]
        argv += ["--train", *map(str, micro_config.train), "--val", *micro_config.val]
        argv += ["--steps", "24", "--batch-size", "4", "--val-batch-size", "2"]
        argv += ["--checkpoint-every", "3", "--audit-every", "4", "--order", "1"]
        argv += ["--mesh", "data=1", *more]
        return [sys.executable, "-m", "ghostjax", *argv]

    # A cache of its own: an entry that is being written when the process is killed may be broken.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment)
    whole, out = read_run(tmp_path / "whole"), tmp_path / "killed"
    # By this machine's own pace, so that a fast one is killed as often.
    written = sorted(part.stat().st_mtime for part in (tmp_path / "whole/log").glob("*"))
    gap = float(np.median(np.diff(written)))
    rng = np.random.default_rng()
    kills = 0
    for _ in range(40):
        started = (out / "run.json").exists()
        process = subprocess.Popen(command(out, *["--resume"] if started else []), env=environment)
        # Not before the log has grown, so that there is progress; then at a random moment. Parts
        # that are dropped and written again are no growth.
        before = len(list((out / "log").glob("*")))
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            if len(list((out / "log").glob("*"))) > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2 * gap))
        if process.poll() is None:
            process.kill()
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        if (out / "summary.json").exists():  # whether or not it was killed while it ended
            break
        if not (out / "run.json").exists():
            for path in out.glob("*"):
                path.unlink()
    assert kills >= 3
    same_log(read_run(out), whole)
    assert (out / "values.parquet").read_bytes() == (tmp_path / "whole/values.parquet").read_bytes()
