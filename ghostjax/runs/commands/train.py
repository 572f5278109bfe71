"""``ghostjax train``: examples in, a trained model and the examples' values out."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ghostjax._task import IN_PYTHON, Task
from ghostjax.runs.analysis.summary import write_summary
from ghostjax.runs.commands.options import use_compilation_cache
from ghostjax.runs.commands.same_run import (
    check_same_programs,
    check_same_run,
    wait_until_seen,
)
from ghostjax.runs.commands.signals import SIGNALS, noted
from ghostjax.runs.commands.unchanged import check_data, check_params, check_programs
from ghostjax.runs.config import CHANGEABLE, TrainConfig
from ghostjax.runs.data.load import load_task
from ghostjax.runs.data.task import LoadedTask, Skipped
from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.processes.collective import is_first, largest, meet
from ghostjax.runs.processes.together import part, together
from ghostjax.runs.report.output import make_console
from ghostjax.runs.report.progress import Progress
from ghostjax.runs.report.terminal import print_summary
from ghostjax.runs.store import checkpoints, files
from ghostjax.runs.store.begin import begun_now, versions, write_examples
from ghostjax.runs.store.fingerprint import fingerprint, fingerprints
from ghostjax.runs.store.log import LogWriter
from ghostjax.runs.store.run import Run, read_run
from ghostjax.runs.store.weights import read_weights
from ghostjax.runs.training import placement as placements
from ghostjax.runs.training import preflight
from ghostjax.runs.training.trainer import Step, Trainer, batches

COST_STEPS = 16  # scored ones; the times of fewer tell little


def run(
    config: TrainConfig,
    given: Collection[str] | None = None,
    own: Task | Callable[[], Task] | None = None,
) -> dict[str, Any]:
    """Trains, writes the run directory ``config.out``, prints a report; returns the summary.

    Everything that can be wrong with the options and the data is found before anything is written.
    Whenever the process ends, the directory holds a run that ``--resume`` goes on with.

    Args:
      given: The names of the options that were given, as ``TrainConfig.resumed`` asks for them.
      own: The task that ``config.task`` is a name of. None: it is found by that name.

    Raises:
      UsageError: options or data cannot be used, or ``config.out`` is not empty.
      StoppedError: training cannot go on, or the disk is full; what came before is kept.
      KeyboardInterrupt: after the step at which it came was written; ``TerminatedError`` for
        SIGTERM.
    """
    config.check_processes()
    own_process = (config.coordinator, config.num_processes, config.process_id, config.distributed)
    with together(*own_process):
        if not is_first():
            config = dataclasses.replace(config, quiet=True)
        return _run(config, given, own)


def _run(
    config: TrainConfig, given: Collection[str] | None, own: Task | Callable[[], Task] | None
) -> dict[str, Any]:
    resumed, folders = None, []
    if config.resume:
        done = read_run(config.out)
        resumed = done.begun()
        config = config.resumed(resumed["options"], given)
        _check_length(done, config)
        _check_task_given(config, own)
        folders = [Path(resumed["folder"])] if "folder" in resumed else []
    else:
        files.check_out(config.out)
    config.check()
    use_compilation_cache(config.compilation_cache)
    placement = placements.make_placement(config)
    task = load_task(config, own, folders)
    _check_optimizer_given(config, task, given)
    params, trainer, started = _prepare(config, task, resumed, placement)
    with contextlib.ExitStack() as stack:
        if is_first():
            _begin(config, task, resumed, started, placement, stack)
        meet("the run has begun")
        wait_until_seen(config.out)
        stack.enter_context(files.disk_errors(config.out, lambda: _way_out(config)))
        begin = time.perf_counter()
        cost = _train(read_run(config.out), config, task, trainer, params, placement)
        if is_first():
            write_summary(config.out, time.perf_counter() - begin, cost=cost)
        meet("the run is over")
    run = read_run(config.out)
    if not config.quiet:
        print_summary(make_console(sys.stdout), run)
    return run.summary


def _begin(
    config: TrainConfig,
    task: LoadedTask,
    resumed: dict[str, Any] | None,
    started: dict[str, Any],
    placement: placements.Placement,
    stack: contextlib.ExitStack,
) -> None:
    """Writes what is there before the first step; the directory stays locked by the stack."""
    if resumed is None:
        files.create_out(config.out)
    elif not config.quiet:
        _tell_new_versions(resumed.get("versions", {}))
    if resumed is None and task.skipped.count and not config.quiet:
        _tell_skipped(task.skipped)
    stack.enter_context(files.lock(config.out))
    with files.disk_errors(config.out, lambda: _way_out(config)):
        if resumed is None:
            files.write_json(config.out / "run.json", started)
        else:
            _note_changes(config, resumed, placement)
        write_examples(config.out, task.examples)


def _prepare(
    config: TrainConfig,
    task: LoadedTask,
    resumed: dict[str, Any] | None,
    placement: placements.Placement,
) -> tuple[Any, Trainer, dict[str, Any]]:
    """Initial parameters, trainer and metadata, once all of them are known to be usable.

    Raises:
      UsageError: they are not, or not those that the run began with.
    """
    digests, data = fingerprints(task.contents())
    if resumed is not None:
        check_data(resumed, digests, data, config.out)
    params = placement.made(lambda: task.init_params(config.seed))
    is_own, is_begun = config.task is not None, checkpoints.latest(config.out) is not None
    # Behind a checkpoint the weights are not needed, so they may be gone.
    if config.init_from is not None and not (is_begun and not config.init_from.exists()):
        params = placement.made(lambda: read_weights(config.init_from, params))
        if resumed is not None:
            what = f"the weights in {config.init_from}"
            check_params(resumed, fingerprint(params), what, config.out)
    elif resumed is not None and is_own and not is_begun:
        check_params(resumed, fingerprint(params), "what the task's init gives", config.out)
    placements.check_params(placement, params)
    trainer = Trainer(config, task, params, placement)
    metadata = _metadata(config, task, trainer, data, fingerprint(params))
    metadata["devices"] = [{"at": 0, **placement.as_json()}]
    check_same_run(config.out, resumed, metadata)
    # Behind a checkpoint their shapes are enough.
    params = jax.eval_shape(lambda: params) if is_begun else placement.state(params)
    metadata["data"] = digests
    if is_own:
        batch = next(batches(config, task, placement=placement))
        preflight.check_train_losses(task, params, batch)
        metadata["programs"] = preflight.programs(task, trainer.like(params), batch.train_rows)
        check_same_programs(metadata["programs"])
        if resumed is None:
            preflight.check_losses(task, params, batch, placement)
            preflight.check_micro_steps(trainer.optimizer, params, config.score_every)
        metadata["folder"] = os.getcwd()
        if resumed is not None:
            check_programs(resumed, metadata["programs"], metadata["versions"], config.out)
    return params, trainer, metadata


def _check_task_given(config: TrainConfig, own: Any) -> None:
    if config.task == IN_PYTHON and own is None:
        raise UsageError(
            f"{config.out} was started in Python, with a task that has no name: go on with "
            "ghostjax.run(task, out, resume=True)"
        )
    if config.task is None and own is not None:
        raise UsageError(f"{config.out} was started without a task of one's own")


def _check_optimizer_given(
    config: TrainConfig, task: LoadedTask, given: Collection[str] | None
) -> None:
    """Raises ``UsageError`` for options that a task's own optimizer would not heed."""
    if task.optimizer is None or config.resume:
        return
    defaults = TrainConfig(config.out)
    for name in ("optimizer", "learning_rate", "clip"):
        if getattr(config, name) != getattr(defaults, name) or name in (given or ()):
            option = name.replace("_", "-")
            raise UsageError(f"--{option}: the task has an optimizer of its own, which says it")


def _check_length(done: Run, config: TrainConfig) -> None:
    """Raises ``UsageError`` where there is nothing to do, or less than was done."""
    if done.summary is not None and config.steps <= done.end:
        raise UsageError(
            f"{config.out} is a complete run of {done.end} steps: there is nothing to resume; "
            "--steps of more than these makes it longer"
        )
    made = checkpoints.latest(config.out) or 0
    if config.steps < made:
        raise UsageError(f"--steps {config.steps}: the run has made {made} steps already")


def _note_changes(
    config: TrainConfig, started: dict[str, Any], placement: placements.Placement
) -> None:
    """Has the run go on to ``config.steps``, on these devices. Stopped anywhere, it leaves one that
    can go on."""
    begun, at = started["options"], checkpoints.latest(config.out) or 0
    value = {
        **started,
        "options": {**begun, **{name: getattr(config, name) for name in CHANGEABLE}},
    }
    devices = started.get("devices", [])
    if devices and {**devices[-1], "at": 0} != {**placement.as_json(), "at": 0}:
        value["devices"] = [*devices, {"at": at, **placement.as_json()}]
    if begun.get("steps") != config.steps:
        for name in ("summary.json", "values.parquet"):
            (config.out / name).unlink(missing_ok=True)
        change = {"at": at, "from": begun.get("steps"), "to": config.steps}
        value["lengths"] = [*started.get("lengths", []), change]
    if value != started:
        files.write_json(config.out / "run.json", value)


def _way_out(config: TrainConfig) -> str:
    begun = (config.out / "run.json").exists()
    return "ghostjax train --resume goes on" if begun else "start again"


def _metadata(
    config: TrainConfig, task: LoadedTask, trainer: Trainer, data: str, params: str
) -> dict[str, Any]:
    """What ``run.json`` holds."""
    return {
        **begun_now(task.name, task.unit, list(task.val_sizes)),
        "kinds": trainer.kinds,
        "examples": len(task.examples),
        "val_examples": task.val_sizes,
        "skipped": task.skipped.count,
        "seed": config.seed,
        "options": config.as_json(),
        "fingerprints": {"data": data, "params": params},
    }


def _tell_new_versions(before: dict[str, str]) -> None:
    """A resumed run equals an undisturbed one only where the same code goes on with it."""
    changes = [
        f"{name} {version} (was {before[name]})"
        for name, version in versions().items()
        if before.get(name, version) != version
    ]
    if changes:
        line = f"Versions changed since the run began: {', '.join(changes)}"
        make_console(sys.stderr).print(line, markup=False, soft_wrap=True)


def _tell_skipped(skipped: Skipped) -> None:
    which = ", ".join(skipped.places) + (", ..." if skipped.count > len(skipped.places) else "")
    line = f"Skipped {skipped.count} documents that are empty or too short: {which}"
    make_console(sys.stderr).print(line, markup=False, soft_wrap=True)


def _train(
    begun: Run,
    config: TrainConfig,
    task: LoadedTask,
    trainer: Trainer,
    params: Any,
    placement: placements.Placement,
) -> Any:
    """Makes the steps that are still to be made, and writes log and checkpoints.

    Returns:
      What ``measured_cost`` does.
    """
    out, sets = config.out, list(task.val_sizes)
    start = checkpoints.latest(out) or 0
    if start:
        initial = checkpoints.restore(out, start, trainer.like(params), begun.identity)
    else:
        initial = trainer.init_state(params)
    # Last, as it drops what the log has beyond the checkpoint.
    writer = LogWriter.resume(out, sets, start, jax.process_index(), jax.process_count())
    meet("the log goes on")
    console = None if config.quiet else make_console(sys.stderr)
    if writer.dropped and console is not None:
        last = start + writer.dropped - 1
        console.print(f"Steps {start} to {last} had no checkpoint and are made again", markup=False)
    show = Progress(console, start, config.steps, config.batch_size)
    end, seconds = start, {True: [], False: []}
    with show, noted() as received:
        try:
            for state, step in trainer.steps(initial, start):
                _append(writer, task, trainer, step, placement.own_rows(config.batch_size))
                if step.seconds is not None:
                    seconds[trainer.is_scored(step.number)].append(step.seconds)
                show.step(step)
                end = step.number + 1
                if step.fault:
                    raise StoppedError(step.fault)
                is_last = end == config.steps
                stop = largest(received())
                if end % config.checkpoint_every == 0 or is_last or stop:
                    writer.flush(end)
                    checkpoints.save(out, end, state, begun.identity)
                if stop and not is_last:
                    part()
                    raise SIGNALS[stop]
        except StoppedError:
            writer.flush(end)
            part()
            raise
    if len(seconds[True]) < COST_STEPS:
        return None
    if not seconds[False]:
        seconds[False].append(trainer.seconds_of_plain_step(state, step.batch))
    return measured_cost(seconds[True], seconds[False], config.score_every)


def measured_cost(
    scored: Sequence[float], plain: Sequence[float], every: int
) -> dict[str, float | int]:
    """What scores cost: median seconds of a scored and of a plain step, and steps over plain ones.

    >>> measured_cost([0.6], [0.1, 0.1], 5)
    {'scored_step': 0.6, 'plain_step': 0.1, 'ratio': 2.0, 'score_every': 5}
    """
    scored_step, plain_step = (round(float(np.median(each)), 6) for each in (scored, plain))
    ratio = (scored_step + (every - 1) * plain_step) / (every * plain_step)
    return {
        "scored_step": scored_step,
        "plain_step": plain_step,
        "ratio": round(ratio, 2),
        "score_every": every,
    }


def _append(
    writer: LogWriter, task: LoadedTask, trainer: Trainer, step: Step, rows: np.ndarray
) -> None:
    """Adds a step to the log, and of its ``rows`` these."""
    record, batch, sets = step.record, step.batch, list(task.val_sizes)
    common = {"step": step.number, "learning_rate": np.float32(step.learning_rate)}
    own = {name: found[..., rows] for name, found in record.scores.items()}
    own |= {"id": [task.examples.id(index) for index in batch.indices[rows]]}
    writer.append("scores", {"norm": None, **common, **own, "start": batch.starts[rows]})
    if not is_first():
        return
    writer.append("steps", {**common, **record.steps})
    if not trainer.is_scored(step.number):
        return
    writer.append(
        "kinds",
        {
            "step": step.number,
            "kind": trainer.kinds * len(sets),
            "set": [which for which in sets for _ in trainer.kinds],
            "score": record.kinds.reshape(-1),
        },
    )
