"""A run that several processes make has the log of one process; none goes on without the rest."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ghostjax.runs.commands.rank import RankConfig
from ghostjax.runs.commands.rank import run as rank
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.run import read_run
from tests.runs.commands.test_devices import assert_same_log, assert_same_values

ROOT = pathlib.Path(__file__).parents[3]
STEPS, EVERY = 48, 4
TASK = "tests.runs.commands.test_devices:make_task"
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
}


def command(out, *more):
    options = ["--optimizer", "sgd", "--batch-size", "8", "--val-batch-size", "16"]
    options += ["--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--task", TASK]
    options = ["--resume"] if "--resume" in more else options
    argv = ["train", "--out", str(out), "--quiet", *options]
    return [sys.executable, "-m", "ghostjax", *argv, *(word for word in more if word != "--resume")]


def start(out, *more, count=2, own=()):
    """The processes of a run, with their stderr; ``own`` are options of single ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for index in range(count):
        several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        several += ["--process-id", str(index), *dict(own).get(index, [])]
        argv = command(out, *more, *several)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found.append(subprocess.Popen(argv, env=ENVIRONMENT, cwd=ROOT, **pipes))
    return found


def ends(processes, timeout=300):
    """Exit codes and our own lines on stderr; gloo has lines of its own."""
    found = []
    for process in processes:
        _, stderr = process.communicate(timeout=timeout)
        lines = [line for line in stderr.splitlines() if "Gloo" not in line]
        found.append((process.returncode, lines))
    return found


def told_of(lost):
    line = f"ghostjax: error: process {lost} of the run was lost: start all of them again, with "
    return line + "--resume if the run had begun"


def wait_for_checkpoint(out, processes, timeout=300):
    limit = time.monotonic() + timeout
    while checkpoints.latest(out) is None:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes") / "one"
    subprocess.run(command(out, "--mesh", "data=1"), check=True, env=ENVIRONMENT, cwd=ROOT)
    return read_run(out)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(tmp_path, one, capsys):
    out = tmp_path / "run"
    processes = start(out, "--fsdp")
    wait_for_checkpoint(out, processes)
    processes[1].kill()
    killed = time.monotonic()
    (first, lines), (second, _) = ends(processes)
    assert time.monotonic() - killed < 10
    assert (first, second) == (1, -signal.SIGKILL)
    assert lines == [told_of(1)]
    assert 0 < checkpoints.latest(out) < STEPS

    assert ends(start(out, "--resume")) == [(0, []), (0, [])]
    run = read_run(out)
    assert_same_log(run, one)
    assert_same_values(run, one)
    assert len(list((out / "log").glob("scores-*-of-00002.parquet"))) == 2 * STEPS // EVERY
    assert len(list((out / "log").glob("steps-*"))) == STEPS // EVERY
    assert {each["processes"] for each in run.metadata["devices"]} == {2}
    for source in (run, one):
        rank(RankConfig(source.path, csv=True, count=5))
    mine, theirs = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert [line.split(",")[:2] for line in mine] == [line.split(",")[:2] for line in theirs]
    assert "nan" not in make_report(run).lower().replace("provenance", "")


@pytest.mark.slow
def test_the_first_process_may_be_the_one_that_is_killed(tmp_path, one):
    out = tmp_path / "run"
    processes = start(out)
    wait_for_checkpoint(out, processes)
    processes[0].kill()
    killed = time.monotonic()
    (first, _), (second, lines) = ends(processes)
    assert time.monotonic() - killed < 10
    assert first == -signal.SIGKILL
    assert second != 0
    # JAX aborts at the same moment; which of the two is quicker, nobody knows.
    assert told_of(0) in lines or second == -signal.SIGABRT

    # One process goes on with what two began.
    again = command(out, "--resume", "--mesh", "data=2")
    subprocess.run(again, check=True, env=ENVIRONMENT, cwd=ROOT)
    run = read_run(out)
    assert_same_log(run, one)
    assert [each["processes"] for each in run.metadata["devices"]] == [2, 1]
    kinds = {path.name.count("-of-") for path in (out / "log").glob("scores-*")}
    assert kinds == {0, 1}


@pytest.mark.slow
def test_sigterm_to_one_ends_all_after_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    processes = start(out)
    wait_for_checkpoint(out, processes)
    processes[1].terminate()
    line = ["ghostjax: error: ended; ghostjax train --resume goes on"]
    assert ends(processes) == [(143, line), (143, line)]
    assert checkpoints.latest(out) == read_run(out).end < STEPS


@pytest.mark.slow
def test_what_is_wrong_in_one_process_is_told_by_all(tmp_path):
    out = tmp_path / "run"
    (first, told), (second, own) = ends(start(out, own={1: ["--seed", "1"]}))
    assert (first, second) == (2, 2)
    for lines in (told, own):
        assert lines == ["ghostjax: error: the options of process 1 are not those of process 0"]
    assert not out.exists()
    (first, told), (second, own) = ends(start(out, own={1: ["--clip", "-1"]}))
    assert (first, second) == (1, 2)
    assert own == ["ghostjax: error: --clip must be positive, or 0 not to clip, got -1"]
    assert told[0].startswith("ghostjax: error: process 1 of the run ended: --clip must be pos")
    assert not out.exists()


@pytest.mark.slow
def test_the_cluster_says_which_processes_there_are(tmp_path, one):
    """As SLURM does, by its environment."""
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] % 2**12  # JAX makes a port of it
    several = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    several["SLURM_STEP_NUM_NODES"] = "1"
    processes = []
    for index in ("0", "1"):
        own = {
            **several,
            "SLURM_PROCID": index,
            "SLURM_LOCALID": index,
            "SLURM_STEP_NUM_NODES": "1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        argv = command(out, "--distributed")
        processes.append(subprocess.Popen(argv, env={**ENVIRONMENT, **own}, cwd=ROOT, **pipes))
    assert ends(processes) == [(0, []), (0, [])]
    assert_same_log(read_run(out), one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "several processes need --num-processes and --process-id, too"),
        ({"num_processes": 2, "process_id": 0}, "several processes need --coordinator, too"),
        ({"coordinator": "a:1", "distributed": True}, "--coordinator and --distributed exclude"),
        ({"coordinator": "a"}, "--coordinator a: expected HOST:PORT"),
        ({"coordinator": "a:1", "process_id": 2}, "--process-id 2 must be from 0 to 1, one less"),
    ],
)
def test_options_of_processes(tmp_path, options, message):
    if options.get("coordinator") and (len(options) > 1 or options["coordinator"] == "a"):
        options = {"num_processes": 2, "process_id": 0, **options}
    with pytest.raises(UsageError) as raised:
        TrainConfig(tmp_path, **options).check_processes()
    assert message in str(raised.value)


def test_without_a_cluster_there_is_nobody_to_join(tmp_path):
    argv = [sys.executable, "-m", "ghostjax", "train", "--out", str(tmp_path / "run")]
    argv += ["--distributed"]
    done = subprocess.run(argv, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ghostjax: error: jax.distributed.initialize: coordinator_add")
    assert "give --coordinator, --num-processes and --process-id" in done.stderr
