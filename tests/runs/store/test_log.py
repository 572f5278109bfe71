import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import schema
from ghostjax.runs.store.log import LogWriter, cut_log, find_parts
from ghostjax.runs.store.run import read_run
from tests.runs import small_run
from tests.runs.store import killed_log


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tables(out):
    run = read_run(out)
    return {table: getattr(run, table) for table in schema.LOG_TABLES}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    # JAX warns of every fork.
    command = [sys.executable, "-W", "ignore", "-m", killed_log.__name__, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_has_the_log_of_one_that_was_not(killed):
    folder, counts = killed
    assert counts["kills"] >= 6
    expected = tables(folder / "whole")
    assert len(expected["steps"]) == killed_log.STEPS
    for out in (folder / "random").iterdir():
        assert tables(out) == expected
        assert names(out / "log") == names(folder / "whole" / "log")


@pytest.mark.slow
def test_a_run_killed_at_any_system_call_has_the_log_of_one_that_was_not(killed):
    folder, counts = killed
    # Two flushes of three parts and two checkpoints, each at least synced and renamed.
    assert counts["calls"] >= 2 * (3 + 1) * 2
    expected = tables(folder / "short")
    assert len(expected["steps"]) == killed_log.SHORT_STEPS
    for out in (folder / "calls").iterdir():
        assert tables(out) == expected
        assert names(out / "log") == names(folder / "short" / "log")
        assert names(out) == names(folder / "short")


def test_the_log_holds_what_was_appended(tmp_path):
    found = tables(small_run.write(tmp_path / "run"))
    for table, joined in found.items():
        assert joined.schema.equals(schema.table_schema(table, small_run.SETS), check_metadata=True)
        for step in (0, 5, 7):
            rows = joined.filter(pa.compute.equal(joined["step"], step))
            for name, value in small_run.rows(table, step).items():
                expected = np.broadcast_to(np.array(value, object), len(rows)).tolist()
                if isinstance(value, float):
                    expected = np.float32(expected).tolist()
                assert rows[name].to_pylist() == expected


def test_parts_are_named_by_their_steps(tmp_path):
    small_run.write(tmp_path / "run", steps=5, every=2)
    assert names(tmp_path / "run" / "log") == sorted(
        schema.part_name(table, first, min(first + 2, 5))
        for table in schema.LOG_TABLES
        for first in (0, 2, 4)
    )


def test_numbers_of_other_libraries_and_precisions_are_taken(tmp_path):
    columns = small_run.rows("scores", 0)
    columns["loss"] = jnp.array([0.5, 1.0, -2.0], jnp.bfloat16)
    columns["score_val"] = np.array([0.1, 0.2, 0.3])
    columns["id"] = list(columns["id"])
    columns["start"] = np.uint8([1, 2, 3])
    log = LogWriter(tmp_path, small_run.SETS)
    log.append("scores", columns)
    for table in ("steps", "kinds"):
        log.append(table, small_run.rows(table, 0))
    log.flush(1)
    rows = pq.read_table(tmp_path / "log" / schema.part_name("scores", 0, 1))
    assert rows["loss"].to_pylist() == [0.5, 1.0, -2.0]
    assert rows["score_val"].to_pylist() == np.float32([0.1, 0.2, 0.3]).tolist()
    assert rows["start"].to_pylist() == [1, 2, 3]


BAD_COLUMNS = {
    "missing": ({"loss": ...}, ValueError, "log/scores: missing columns loss"),
    "unknown": ({"lost": 1.0}, ValueError, "log/scores: unknown columns lost"),
    "float for int": ({"start": 0.0}, TypeError, "column start must be int64, got float64"),
    "int for float": ({"loss": 1}, TypeError, "column loss must be float, got int64"),
    "bool for int": ({"start": True}, TypeError, "column start must be int64, got bool"),
    "number for text": ({"id": [1, 2, 3]}, TypeError, "column id must be string"),
    "none": ({"id": None}, ValueError, "column id must not be None"),
    "none in text": ({"id": ["a", None, "b"]}, ValueError, "column id must not be None"),
    "lengths": ({"start": [0, 1]}, ValueError, "different lengths.*'start': 2"),
    "rank": ({"start": [[0], [1], [2]]}, ValueError, r"column start has shape \[3, 1\]"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_columns_that_are_not_those_of_the_schema_are_refused(tmp_path, change, error, message):
    columns = small_run.rows("scores", 0) | change
    columns = {name: value for name, value in columns.items() if value is not ...}
    with pytest.raises(error, match=message):
        LogWriter(tmp_path, small_run.SETS).append("scores", columns)


@pytest.mark.parametrize(
    ("steps", "end"), [([0, 1], 3), ([0, 1], 1), ([1], 2), ([0, 2], 3), ([1, 0], 2), ([], -1)]
)
def test_a_part_has_all_of_its_steps_in_order(tmp_path, steps, end):
    log = LogWriter(tmp_path, small_run.SETS)
    for step in steps:
        for table in schema.LOG_TABLES:
            log.append(table, small_run.rows(table, step))
    with pytest.raises(ValueError, match=r"expected the steps from 0 to"):
        log.flush(end)
    assert names(tmp_path) == []


@pytest.mark.parametrize("table", schema.LOG_TABLES)
def test_rows_of_steps_outside_the_part_are_refused(tmp_path, table):
    log = LogWriter(tmp_path, small_run.SETS)
    for name in schema.LOG_TABLES:
        log.append(name, small_run.rows(name, 0))
    log.append(table, small_run.rows(table, 1))
    with pytest.raises(ValueError, match=rf"log/{table}: expected the steps from 0 to 0, in order"):
        log.flush(1)


def test_nothing_new_is_no_part(tmp_path):
    small_run.write(tmp_path / "run", steps=2)
    before = names(tmp_path / "run" / "log")
    LogWriter.resume(tmp_path / "run", small_run.SETS, 2).flush(2)
    assert names(tmp_path / "run" / "log") == before


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path):
    out = small_run.write(tmp_path / "run", steps=6)
    (out / "log" / ".scores-00000006-00000008.parquet.partial").write_text("half")
    (out / ".run.json.partial").write_text("half")
    (out / "log" / schema.part_name("kinds", 4, 6)).unlink()
    LogWriter.resume(out, small_run.SETS, 2)
    assert names(out / "log") == sorted(
        schema.part_name(table, 0, 2) for table in schema.LOG_TABLES
    )
    assert ".run.json.partial" not in names(out)


class Stop(Exception):
    pass


@pytest.mark.parametrize("call", range(6))
def test_resuming_can_be_interrupted_too(tmp_path, monkeypatch, call):
    out = small_run.write(tmp_path / "run", steps=8)
    left = [call]

    def unlink(path, remove=os.unlink):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(Stop):
            LogWriter.resume(out, small_run.SETS, 4)
    LogWriter.resume(out, small_run.SETS, 4)
    assert read_run(out).end == 4


def test_checkpoints_that_were_deleted_cost_no_log(tmp_path):
    out = small_run.write(tmp_path / "run", steps=8)
    before = names(out / "log")
    for step, refused in ((0, True), (2, True), (4, False)):
        if refused:
            message = (
                rf"run has steps {step} to 7 in its log but no checkpoint of them: put .* back"
            )
            with pytest.raises(UsageError, match=message):
                LogWriter.resume(out, small_run.SETS, step)
            assert names(out / "log") == before
        else:
            assert LogWriter.resume(out, small_run.SETS, step).dropped == 8 - step


def test_what_was_written_before_the_first_checkpoint_is_made_again(tmp_path):
    out = small_run.write(tmp_path / "run", steps=2)
    assert LogWriter.resume(out, small_run.SETS, 0).dropped == 2
    assert read_run(out).end == 0


@pytest.mark.parametrize("table", schema.LOG_TABLES)
def test_a_damaged_part_is_found_before_training_goes_on(tmp_path, table):
    out = small_run.write(tmp_path / "run", steps=6)
    path = out / "log" / schema.part_name(table, 0, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    before = names(out / "log")
    with pytest.raises(UsageError, match=rf"{path.name} cannot be read: it changed since"):
        LogWriter.resume(out, small_run.SETS, 4)
    assert names(out / "log") == before


BAD_LOGS = {
    "gap": ((2, 4), 6, r"run/log/steps: steps 2 to 3 are missing"),
    "gap after the checkpoint": ((2, 4), 2, r"run/log/steps: steps 2 to 3 are missing"),
    "first": ((0, 2), 6, r"run/log/steps: steps 0 to 1 are missing"),
    "last": ((4, 6), 6, r"run/log/steps: steps 4 to 5 are missing"),
    "behind": (None, 8, r"run/log/scores: steps 6 to 7 are missing"),
    "crossing": (None, 3, r"log/scores-00000002-00000004.parquet goes beyond step 3 of the check"),
}


@pytest.mark.parametrize(("removed", "step", "message"), BAD_LOGS.values(), ids=BAD_LOGS)
def test_a_log_that_does_not_lead_to_the_checkpoint_is_left_alone(tmp_path, removed, step, message):
    out = small_run.write(tmp_path / "run", steps=6)
    if removed:
        (out / "log" / schema.part_name("steps", *removed)).unlink()
    before = names(out / "log")
    with pytest.raises(UsageError, match=message):
        LogWriter.resume(out, small_run.SETS, step)
    assert names(out / "log") == before


@pytest.mark.parametrize("steps", [(1, 3), (2, 2)])
def test_parts_that_overlap_are_refused(tmp_path, steps):
    out = small_run.write(tmp_path / "run", steps=4)
    (out / "log" / schema.part_name("kinds", *steps)).write_text("")
    with pytest.raises(UsageError, match=r"kinds-.*\.parquet does not follow the part before it"):
        find_parts(out, "kinds")


def by_two(out, step, end, first=0):
    """The steps up to ``end``, written by two processes."""
    writers = [LogWriter.resume(out, small_run.SETS, first, n, 2) for n in range(2)]
    for number in range(first, end):
        for n, mine in enumerate(([0, 1], [2])):
            columns = small_run.rows("scores", number)
            own = {
                name: values[mine] if np.ndim(values) else values
                for name, values in columns.items()
            }
            writers[n].append("scores", own)
        for table in ("steps", "kinds"):
            writers[0].append(table, small_run.rows(table, number))
        if (number + 1) % step == 0 or number + 1 == end:
            for writer in writers:
                writer.flush(number + 1)


def test_processes_write_one_log(tmp_path):
    whole = tables(small_run.write(tmp_path / "whole", steps=6))
    small_run.begin(tmp_path / "run")
    by_two(tmp_path / "run", 2, 6)
    assert names(tmp_path / "run" / "log")[3:6] == [
        "scores-00000000-00000002-00001-of-00002.parquet",
        "scores-00000000-00000002-00002-of-00002.parquet",
        "scores-00000002-00000004-00001-of-00002.parquet",
    ]
    assert tables(tmp_path / "run") == whole


def test_a_part_that_not_all_processes_wrote_is_none(tmp_path):
    out = tmp_path / "run"
    small_run.begin(out)
    by_two(out, 2, 6)
    lost = out / "log" / "scores-00000004-00000006-00002-of-00002.parquet"
    lost.unlink()
    assert read_run(out).end == 4
    with pytest.raises(UsageError, match="steps 4 to 5 are missing"):
        LogWriter.resume(out, small_run.SETS, 6)
    # One process goes on, where two were.
    log = LogWriter.resume(out, small_run.SETS, 4)
    assert log.dropped == 2
    assert not list((out / "log").glob("*-00000006*"))
    for step in (4, 5):
        for table in schema.LOG_TABLES:
            log.append(table, small_run.rows(table, step))
    log.flush(6)
    assert tables(out) == tables(small_run.write(tmp_path / "whole", steps=6))
    (out / "log" / "scores-00000002-00000004-00001-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match="steps 2 to 3 are missing"):
        read_run(out)


def test_a_part_of_several_processes_is_cut_as_one(tmp_path):
    out = tmp_path / "run"
    small_run.begin(out)
    by_two(out, 4, 8)
    cut_log(out, small_run.SETS, 6)
    assert "scores-00000004-00000006.parquet" in names(out / "log")
    assert not list((out / "log").glob("*-00000008*"))
    assert tables(out) == tables(small_run.write(tmp_path / "whole", steps=6))
