"""``ghostjax train``: examples in, a trained model and the examples' values out."""

import contextlib
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa

from ghostjax.runs.analysis.summary import make_summary
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.load import load_task
from ghostjax.runs.data.task import Task
from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.report.output import make_console
from ghostjax.runs.report.progress import Progress
from ghostjax.runs.report.terminal import print_summary
from ghostjax.runs.store import checkpoints, files, schema
from ghostjax.runs.store.fingerprint import fingerprint
from ghostjax.runs.store.log import LogWriter
from ghostjax.runs.store.run import Run, read_run
from ghostjax.runs.training.trainer import Step, Trainer


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains, writes the run directory ``config.out``, prints a report; returns the summary.

    Everything that can be wrong with the options and the data is found before anything is written.
    Whenever the process ends, the directory holds a run that ``--resume`` goes on with.

    Raises:
      UsageError: options or data cannot be used, or ``config.out`` is not empty.
      StoppedError: training cannot go on; what came before the step is kept.
      KeyboardInterrupt: after the step at which it came was written.
    """
    resumed = _read_started(config) if config.resume else None
    if resumed is not None:
        config = config.resumed(resumed["options"])
    else:
        files.check_out(config.out)
    config.check()
    task = load_task(config)
    trainer = Trainer(config, task)
    data = fingerprint(task.contents())
    params = trainer.init_params()
    if resumed is None:
        files.create_out(config.out)
    elif resumed["fingerprints"]["data"] != data:
        raise UsageError(f"{config.out}: the data changed since the run began")
    elif not config.quiet:
        _tell_new_versions(resumed.get("versions", {}))
    with files.lock(config.out):
        if resumed is None:
            started = _metadata(config, task, trainer, data, fingerprint(params))
            files.write_json(config.out / "run.json", started)
        files.write_table(config.out / "examples.parquet", _examples_table(task))
        begin = time.perf_counter()
        _train(read_run(config.out), config, task, trainer, params)
        summary, values = make_summary(read_run(config.out), time.perf_counter() - begin)
        files.write_table(config.out / "values.parquet", values)
        files.write_json(config.out / "summary.json", summary)
    if not config.quiet:
        print_summary(make_console(sys.stdout), read_run(config.out))
    return summary


def _read_started(config: TrainConfig) -> dict[str, Any]:
    done = read_run(config.out)
    if done.summary is not None:
        raise UsageError(f"{config.out} is a complete run: there is nothing to resume")
    return done.begun()


def _metadata(
    config: TrainConfig, task: Task, trainer: Trainer, data: str, params: str
) -> dict[str, Any]:
    """What ``run.json`` holds."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "id": uuid.uuid4().hex,
        "task": task.name,
        "unit": task.unit,
        "sets": list(task.val_sizes),
        "kinds": trainer.kinds,
        "examples": len(task.examples),
        "val_examples": task.val_sizes,
        "seed": config.seed,
        "options": config.as_json(),
        "command": sys.argv,
        "fingerprints": {"data": data, "params": params},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("ghostjax", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _tell_new_versions(before: dict[str, str]) -> None:
    """A resumed run equals an undisturbed one only where the same code goes on with it."""
    changes = [
        f"{name} {version} (was {before[name]})"
        for name, version in _versions().items()
        if before.get(name, version) != version
    ]
    if changes:
        line = f"Versions changed since the run began: {', '.join(changes)}"
        make_console(sys.stderr).print(line, markup=False)


def _examples_table(task: Task) -> pa.Table:
    columns = zip(*task.examples)
    fields = schema.table_schema("examples", ())
    arrays = [pa.array(column, field.type) for column, field in zip(columns, fields)]
    return pa.table(arrays, schema=fields)


def _train(begun: Run, config: TrainConfig, task: Task, trainer: Trainer, params: Any) -> None:
    """Makes the steps that are still to be made, and writes log and checkpoints."""
    out, sets = config.out, list(task.val_sizes)
    start = checkpoints.latest(out) or 0
    initial = trainer.init_state(params)
    if start:
        initial = checkpoints.restore(out, start, initial, begun.identity)
    # Last, as it drops what the log has beyond the checkpoint.
    writer = LogWriter.resume(out, sets, start)
    console = None if config.quiet else make_console(sys.stderr)
    if writer.dropped and console is not None:
        last = start + writer.dropped - 1
        console.print(f"Steps {start} to {last} had no checkpoint and are made again", markup=False)
    show = Progress(console, start, config.steps, config.batch_size)
    end = start
    with show, _interrupts() as is_interrupted:
        try:
            for state, step in trainer.steps(initial, start):
                _append(writer, task, trainer, step)
                show.step(step)
                end = step.number + 1
                is_last = end == config.steps
                if end % config.checkpoint_every == 0 or is_last or is_interrupted():
                    writer.flush(end)
                    checkpoints.save(out, end, state, begun.identity)
                if is_interrupted() and not is_last:
                    raise KeyboardInterrupt
        except StoppedError:
            writer.flush(end)
            raise


def _append(writer: LogWriter, task: Task, trainer: Trainer, step: Step) -> None:
    record, batch, sets = step.record, step.batch, list(task.val_sizes)
    common = {"step": step.number, "learning_rate": np.float32(step.learning_rate)}
    ids = [task.examples[index].id for index in batch.indices]
    writer.append("scores", {**common, "id": ids, "start": batch.starts, **record.scores})
    writer.append("steps", {**common, **record.steps})
    writer.append(
        "kinds",
        {
            "step": step.number,
            "kind": trainer.kinds * len(sets),
            "set": [which for which in sets for _ in trainer.kinds],
            "score": record.kinds.reshape(-1),
        },
    )


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the run after the step at hand, so that its state is whole; twice, at once."""
    received = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        yield lambda: False
        return
    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)
