"""A run that several processes make has the log of one process; none goes on without the rest."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ghostjax.runs.commands import same_run
from ghostjax.runs.commands.rank import RankConfig
from ghostjax.runs.commands.rank import run as rank
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.errors import UsageError
from ghostjax.runs.processes import gathering
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.run import read_run
from tests.runs.commands.task_of_several import HERE, MOMENT, OTHERWISE
from tests.runs.commands.test_devices import assert_same_log, assert_same_values

ROOT = pathlib.Path(__file__).parents[3]
STEPS, EVERY = 48, 4
TASK = "tests.runs.commands.task_of_several:make_task"
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


def start(out, *more, count=2, own=(), environment=(), before=(), only=None, port=None):
    """The processes of a run, with their stderr; of single ones, ``own`` are options,
    ``environment`` variables and ``before`` what starts the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    found = []
    for index in range(count) if only is None else only:
        several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        several += ["--process-id", str(index), *dict(own).get(index, [])]
        argv = [*dict(before).get(index, []), *command(out, *more, *several)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = {**ENVIRONMENT, **dict(environment).get(index, {})}
        found.append(subprocess.Popen(argv, env=env, cwd=ROOT, **pipes))
    return found


def ends(processes, timeout=300):
    """Exit codes and all lines on stderr."""
    found = []
    for process in processes:
        _, stderr = process.communicate(timeout=timeout)
        found.append((process.returncode, stderr.splitlines()))
    return found


def told_of(lost):
    line = f"ghostjax: error: process {lost} of the run was lost: start all of them again, with "
    return line + "--resume if the run had begun"


def wait_for(is_so, processes, timeout=300):
    limit = time.monotonic() + timeout
    while not is_so():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < limit
        time.sleep(0.002)


def wait_for_checkpoint(out, processes):
    wait_for(lambda: checkpoints.latest(out) is not None, processes)


def begun_checkpoint(out, after):
    """Whether a checkpoint is being written, later than that of a step."""
    begun = [path.name for path in (out / "checkpoints").glob("*-checkpoint-tmp*")]
    return any(int(name.partition(".")[0]) > after for name in begun)


def kill(processes, victim):
    """Kills one; the others must say so with one line, and nothing else, within seconds."""
    processes[victim].kill()
    killed = time.monotonic()
    found = ends(processes, timeout=60)
    assert time.monotonic() - killed < 10
    assert found.pop(victim) == (-signal.SIGKILL, [])
    assert found == [(1, [told_of(victim)])] * len(found)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes") / "one"
    subprocess.run(command(out, "--mesh", "data=1"), check=True, env=ENVIRONMENT, cwd=ROOT)
    return read_run(out)


def killed_in_python(out, victim, *moments):
    """A process that reads data or traces a program."""
    mark = out.parent / "mark"
    for moment in moments:
        there = {victim: mark, 1 - victim: out.parent / "other"}
        environment = {n: {HERE: str(path), MOMENT: moment} for n, path in there.items()}
        processes = start(out, "--fsdp", environment=environment)
        wait_for(mark.exists, processes)
        mark.unlink()
        kill(processes, victim)
        assert not (out / "run.json").exists()


def killed_in_training(out, victim):
    """A process that makes steps, then one that writes a checkpoint."""
    processes = start(out, "--fsdp")
    wait_for_checkpoint(out, processes)
    kill(processes, victim)
    made = checkpoints.latest(out)
    assert 0 < made < STEPS
    processes = start(out, "--resume")
    wait_for(lambda: begun_checkpoint(out, made), processes)
    kill(processes, victim)
    assert made <= checkpoints.latest(out) < STEPS


@pytest.mark.slow
def test_a_process_may_be_killed_wherever_it_is_and_the_run_goes_on(tmp_path, one, capsys):
    out = tmp_path / "run"
    killed_in_python(out, 1, "compiling")
    killed_in_training(out, victim=1)
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
    killed_in_python(out, 0, "data", "compiling")
    killed_in_training(out, victim=0)

    # One process goes on with what two began, and then two with what it made.
    made = checkpoints.latest(out)
    again = command(out, "--resume", "--mesh", "data=2")
    alone = subprocess.Popen(again, env=ENVIRONMENT, cwd=ROOT)
    wait_for(lambda: checkpoints.latest(out) > made, [alone])
    alone.kill()
    alone.wait()

    processes = start(out, "--resume", "--mesh", "data=8")
    wait_for((out / "summary.json").exists, processes)
    processes[0].kill()
    first, second = ends(processes)
    assert first == (-signal.SIGKILL, [])
    # It is lost, unless it had said farewell.
    assert second in [(1, [told_of(0)]), (0, [])]
    run = read_run(out)
    assert_same_log(run, one)
    assert [each["processes"] for each in run.metadata["devices"]] == [2, 1, 2]
    kinds = {path.name.count("-of-") for path in (out / "log").glob("scores-*")}
    assert kinds == {0, 1}


@pytest.mark.slow
def test_a_process_that_is_killed_before_all_are_there(tmp_path):
    with gathering.open_server(0, 1) as server:  # in the place of the first of three
        port = server.getsockname()[1]
        processes = start(tmp_path / "run", count=3, only=[1], port=port)
        server.accept()[0].close()
        assert ends(processes) == [(1, [told_of(0)])]
    processes = start(tmp_path / "run", count=3, only=[0], port=port)
    with gathering._reach(("127.0.0.1", port), "the first", 1) as connection:
        connection.sendall(gathering._greeting(1, 3))
    assert ends(processes) == [(1, [told_of(1)])]


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
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            OTHERWISE,
            "another loss",
            "the task's row_losses of process 1 are not those of process 0",
        ),
        (OTHERWISE, "fewer rows", "the data of process 1 are not those of process 0"),
        (
            "XLA_FLAGS",
            "--xla_force_host_platform_device_count=2",
            "process 1 has 2 devices, process 0 4: give all processes the same",
        ),
    ],
)
def test_what_differs_is_told_before_anything_waits(tmp_path, name, value, told):
    processes = start(tmp_path / "run", environment={1: {name: value}})
    found = ends(processes, timeout=120)
    for code, lines in found:
        assert (code, len(lines)) == (2, 1)
        assert lines[0].startswith(f"ghostjax: error: {told}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_fault_in_one_process_has_its_traceback_there_and_one_line_elsewhere(tmp_path):
    processes = start(tmp_path / "run", environment={1: {OTHERWISE: "a fault"}})
    (first, told), (second, traceback) = ends(processes, timeout=120)
    assert (first, second) == (1, 1)
    reason = "the task is broken, here alone"
    assert told == [f"ghostjax: error: process 1 of the run ended: {reason}"]
    assert traceback[0] == "Traceback (most recent call last):"
    # Nothing of JAX's comes after it.
    assert traceback[-2:] == ["RuntimeError: the task is broken,", "here alone"]


@pytest.mark.slow
def test_a_fault_in_python_ends_as_that_of_the_command(tmp_path):
    """JAX would wait for those that have ended, and abort."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index, env in enumerate((ENVIRONMENT, {**ENVIRONMENT, OTHERWISE: "a fault"})):
        options = {"coordinator": coordinator, "num_processes": 2, "process_id": index}
        code = f"import ghostjax; ghostjax.run({TASK!r}, {str(tmp_path / 'run')!r}, **{options})"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        argv = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(argv, env=env, cwd=ROOT, **pipes))
    (first, told), (second, traceback) = ends(processes, timeout=120)
    assert (first, len(told), second) == (1, 1, 1)
    assert traceback[-2:] == ["RuntimeError: the task is broken,", "here alone"]


@pytest.mark.slow
def test_a_disk_that_is_full_in_one_process_ends_all(tmp_path):
    full = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash"]
    processes = start(tmp_path / "run", "--no-compilation-cache", before={1: full})
    (first, told), (second, own) = ends(processes, timeout=120)
    assert (first, second) == (1, 1)
    reason = own[0].removeprefix("ghostjax: error: ")
    assert reason.startswith(f"cannot write {tmp_path / 'run'}")
    assert reason.endswith("put that right, then ghostjax train --resume goes on")
    assert own[1:] == []
    assert told == [f"ghostjax: error: process 1 of the run ended: {reason}"]


def test_a_run_directory_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(same_run, "SEEN", 0.2)
    with pytest.raises(UsageError, match="process 0 does not see"):
        same_run.wait_until_seen(tmp_path / "run")
    (tmp_path / "run").mkdir()
    writing = threading.Timer(0.1, (tmp_path / "run" / "run.json").touch)
    writing.start()
    same_run.wait_until_seen(tmp_path / "run")
    writing.join()


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
        (
            {"coordinator": "a:65536", "process_id": 0},
            "--coordinator a:65536: expected HOST:PORT, a port from 1 to 65535",
        ),
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
