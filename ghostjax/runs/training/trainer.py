"""The loop over steps: what each sees, and whether training can go on."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax._kinds import KINDS, kind_of
from ghostjax.runs.analysis.judgement import TOLERANCES, broken_check
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.batches import VisitOrder, generator
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.errors import StoppedError
from ghostjax.runs.training.gradients import PARTS, make_norms
from ghostjax.runs.training.joined import is_worth_joining
from ghostjax.runs.training.optimizers import (
    check_optimizer,
    make_optimizer,
    make_schedule,
    treats_alike,
)
from ghostjax.runs.training.placement import ONE_DEVICE, Placement
from ghostjax.runs.training.preflight import GATHERING, micro_step
from ghostjax.runs.training.step import StepRecord, TrainState, make_plain_step, make_step

AUDITED_ROWS = 2
PLAIN_STEPS = 5
# What a step that is not scored does not have, per validation set.
MEASURED = ("val_loss", "predicted", "actual", "conservation_error", "audit_error", "correlation")


class TrainBatch(NamedTuple):
    """Which examples [B], where their rows start [B], and the rows."""

    indices: np.ndarray
    starts: np.ndarray
    rows: dict[str, np.ndarray]


class Batch(NamedTuple):
    """What one step sees: which examples [B], where their rows start [B], and the rows."""

    indices: np.ndarray
    starts: np.ndarray
    train_rows: Any
    val_rows: Any  # [K, PARTS, V / PARTS, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was made.

    Attributes:
      number: from 0.
      record: of a step that is not scored, the losses and NaN or nothing.
      seconds: that it took, None where something was compiled.
      fault: why training cannot go on, although the step can be logged.
    """

    number: int
    learning_rate: float
    batch: Batch
    record: StepRecord
    seconds: float | None = None
    fault: str | None = None


def batches(
    config: TrainConfig, task: LoadedTask, start: int = 0, placement: Placement = ONE_DEVICE
) -> Iterator[Batch]:
    """Endless batches, from that of step ``start`` on.

    What is drawn at random for a step depends on ``config.seed`` and the step alone. A step takes B
    examples, as ``VisitOrder`` has them, and of every validation set V held-out examples, drawn
    anew without replacement. Rows that ``placement`` takes from other processes are zero.
    """
    sets = list(task.val_sizes)
    own = placement.read_val_rows(config.val_batch_size)
    found = train_batches(config, task, start, placement)
    for step, (indices, starts, train_rows) in enumerate(found, start):
        val_rows = []
        for name in sets:
            chosen, rng = val_choice(config, name, task.val_sizes[name], step)
            rows = task.val_rows(name, chosen, rng, own)
            val_rows.append(_among_zeros(rows, own, len(chosen)))
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves).reshape(len(sets), PARTS, -1, *leaves[0].shape[1:]),
            *val_rows,
        )
        yield Batch(indices, starts, train_rows, stacked)


def train_batches(
    config: TrainConfig, task: LoadedTask, start: int = 0, placement: Placement = ONE_DEVICE
) -> Iterator[TrainBatch]:
    """What ``batches`` has of the training rows alone."""
    order = VisitOrder(len(task.examples), config.batch_size, config.seed)
    own = placement.read_rows(config.batch_size)
    for step in itertools.count(start):
        indices = order(step)
        rows, starts = task.train_rows(indices, generator(config.seed, "windows", step), own)
        yield TrainBatch(indices, starts, _among_zeros(rows, own, len(indices)))


def _among_zeros(rows: Any, own: np.ndarray, count: int) -> Any:
    """The ``own`` of ``count`` rows, with zeros in the places of the others."""

    def whole(leaf):
        found = np.zeros((count, *leaf.shape[1:]), leaf.dtype)
        found[own] = leaf
        return found

    return jax.tree.map(whole, rows)


def val_choice(
    config: TrainConfig, name: str, size: int, step: int
) -> tuple[np.ndarray, np.random.Generator]:
    """Which V of the ``size`` examples of a validation set a step takes, and what draws the rest.

    The first half of them is one part of the rows, the second half the other.
    """
    rng = generator(config.seed, f"set {name}", step)
    return rng.choice(size, config.val_batch_size, replace=False), rng


class Trainer:
    """The jitted step of a run and what belongs to it.

    Attributes:
      kinds: the kinds of layers that the model has, in the order of ``StepRecord.kinds``.
      optimizer: what turns gradients into updates.

    Raises:
      UsageError: the optimizer cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: LoadedTask,
        params: Any = None,
        placement: Placement = ONE_DEVICE,
    ):
        """``params`` are the initial parameters, or their shapes. None: those of the task."""
        self._config = config
        self._task = task
        self._placement = placement
        if params is None:
            shapes = jax.eval_shape(lambda: task.init_params(config.seed))
        else:
            shapes = jax.eval_shape(lambda params: params, params)
        self._learning_rates = None
        if task.optimizer is None:
            schedule = make_schedule(config.peak_learning_rate, config.steps)
            self._learning_rates = np.asarray(schedule(jnp.arange(config.steps)))
            optimizer = make_optimizer(config.optimizer, schedule, config.clip, shapes)
        else:
            optimizer = task.optimizer
            check_optimizer(optimizer, shapes, "task.optimizer")
        self.optimizer = placement.optimizer(optimizer)
        # Arrays that are split over devices would be gathered.
        is_alike = task.optimizer is None and treats_alike(config.optimizer)
        is_joined = is_alike and placement.mesh is None and is_worth_joining(shapes)
        row_losses = placement.losses(task.row_losses)
        found = [
            kind_of(jax.tree_util.keystr(path))
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        ]
        self.kinds = [kind for kind in KINDS if kind in found]
        self._plain_step = make_plain_step(
            row_losses, self.optimizer, microbatches=config.microbatches
        )
        self._step = make_step(
            row_losses,
            self.optimizer,
            [self.kinds.index(kind) for kind in found],
            order=config.order,
            microbatches=config.microbatches,
            remat=config.remat,
            is_joined=is_joined,
        )

        self._norms = jax.jit(make_norms(row_losses, config.microbatches))

    def init_state(self, params: Any) -> TrainState:
        """The state before the first step; ``params``, in their places, are used up."""
        return TrainState(params, jax.jit(self.optimizer.init)(params))

    def like(self, params: Any) -> TrainState:
        """The shapes of a state and where its arrays belong, to restore it."""
        return self._placement.shapes(jax.eval_shape(self.init_state, params))

    def steps(self, state: TrainState, start: int) -> Iterator[tuple[TrainState, Step]]:
        """Makes the steps from ``start`` to the end; yields the state after each, to be used before
        the next.

        Raises:
          StoppedError: a loss or a score is not finite.
        """
        config = self._config
        made: set[tuple[bool, bool]] = set()
        found = batches(config, self._task, start, self._placement)
        for number, batch in zip(range(start, config.steps), found):
            begin = time.perf_counter()
            audited = self._audited(number)
            train_rows = self._placement.rows(batch.train_rows)
            if self.is_scored(number):
                norms = {}
                if config.norms:  # first, as the step uses the state up
                    norms["norm"] = self._norms(state.params, train_rows)
                val_rows = self._placement.val_rows(batch.val_rows)
                state, record = self._step(state, train_rows, val_rows, audited)
                record = record._replace(scores={**record.scores, **norms})
            else:
                state, losses = self._plain_step(state, train_rows)
                record = self._unscored(losses)
            record = self._placement.fetch(record)
            kind = self.is_scored(number), audited is not None
            seconds = time.perf_counter() - begin if kind in made else None
            made.add(kind)
            rate = self._learning_rate(number, state)
            step = Step(number, rate, batch, record, seconds)
            self._check(step)
            fault = self._fault(step)
            is_foreign = self._task.optimizer is not None and self.is_scored(number)
            if is_foreign and micro_step(state.opt_state):
                fault = f"stopped: {GATHERING.format(step=number)}"
            yield state, dataclasses.replace(step, fault=fault)

    def _learning_rate(self, number: int, state: TrainState) -> float:
        """That of a step; of a task's own optimizer ``optax.inject_hyperparams`` can tell."""
        if self._learning_rates is not None:
            return float(self._learning_rates[number])
        found = optax.tree_utils.tree_get_all_with_path(state.opt_state, "learning_rate")
        rates = [rate for _, rate in found if getattr(rate, "shape", None) == ()]
        return float(rates[0]) if len(rates) == 1 else math.nan

    def is_scored(self, number: int) -> bool:
        """Whether the rows of a step are scored: the last one of every ``--score-every``."""
        every = self._config.score_every
        return number % every == every - 1

    def seconds_of_plain_step(self, state: TrainState, batch: Batch) -> float:
        """The median time of some steps without scores; ``state`` is used up."""
        seconds = []
        for _ in range(PLAIN_STEPS + 1):
            begin = time.perf_counter()
            train_rows = self._placement.rows(batch.train_rows)
            state, _ = jax.block_until_ready(self._plain_step(state, train_rows))
            seconds.append(time.perf_counter() - begin)
        return float(np.median(seconds[1:]))

    def _unscored(self, losses: Any) -> StepRecord:
        sets = len(self._task.val_sizes)
        nothing = np.full((sets, len(losses)), np.nan, np.float32)
        return StepRecord(
            {"loss": losses, "score": nothing, "error": nothing},
            {"loss": jnp.mean(losses), "undefined": 0} | dict.fromkeys(MEASURED, nothing[:, 0]),
            np.zeros((sets, 0), np.float32),
        )

    def _audited(self, number: int) -> np.ndarray | None:
        """Which rows of a step are redone; every ``--audit-every`` scored steps there are some."""
        count = min(AUDITED_ROWS, self._config.batch_size)
        every, scored = self._config.audit_every, number // self._config.score_every
        if not every or scored % every or not self.is_scored(number):
            return None
        rng = generator(self._config.seed, "audit", number)
        return rng.choice(self._config.batch_size, count, replace=False).astype(np.int32)

    def _check(self, step: Step) -> None:
        record = step.record
        rows, steps = record.scores, record.steps
        norms = [rows["norm"]] if "norm" in rows else []
        by_row = np.isfinite([rows["loss"], *rows["score"], *rows["error"], *norms]).all(axis=0)
        others = [steps["loss"], *steps["val_loss"], *steps["actual"], *steps["predicted"]]
        if not self.is_scored(step.number):
            by_row, others = np.isfinite(rows["loss"]), [steps["loss"]]
        if not by_row.all() or not np.isfinite(others).all():
            ids = [self._task.examples.id(index) for index in step.batch.indices[~by_row]]
            where, remedy = "a validation loss", "lower --learning-rate or look at these examples"
            if ids:
                listed = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if ids[4:] else "")
                where = f"the loss or score of {listed}"
            if not np.isfinite(norms).all():
                where = f"the norm of the gradient of {listed}"
            elif np.isfinite(rows["loss"]).all() and np.isfinite(others).all():
                where = f"the score, but not the loss, of {listed}"
                remedy = "the optimizer's update has no finite derivative here: take another one"
            raise StoppedError(f"stopped at step {step.number}: {where} is not finite; {remedy}")

    def _fault(self, step: Step) -> str | None:
        if not self.is_scored(step.number):
            return None
        tolerance = TOLERANCES[self._config.dtype]
        errors = (step.record.steps[f"{what}_error"] for what in ("conservation", "audit"))
        for name, *own in zip(self._task.val_sizes, *errors):
            broken = broken_check(step.number, name, tolerance, *own)
            if broken:
                return f"stopped at {broken}; the log has the step"
        return None
