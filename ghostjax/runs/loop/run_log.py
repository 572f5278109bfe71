"""``RunLog``: the log of a training loop of one's own, in the files of ``ghostjax train``."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghostjax.runs.analysis.summary import write_summary
from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.loop.columns import (
    by_set,
    check_finite,
    numbers,
    outside_jit,
    parts_by_kind,
    texts_of_ids,
)
from ghostjax.runs.loop.examples import Examples
from ghostjax.runs.store import files
from ghostjax.runs.store.begin import begun_now, write_examples
from ghostjax.runs.store.log import LogWriter, cut_log
from ghostjax.runs.store.run import Run, read_run
from ghostjax.runs.store.schema import SET_NAME

TASK = "own loop"
# What the steps of a log have per validation set; CHECKS may fail, and not every step has them.
MEASURED = ("val_loss", "predicted", "actual")
CHECKS = ("conservation_error", "audit_error", "correlation")


class RunLog:
    """The log of a training loop of one's own: ``ghostjax rank``, ``report`` and ``diff`` read it.

    The value of an example is the sum of its rows' scores over the steps. With scores in the unit
    of the validation loss (dots with what the optimizer makes of the validation gradient, over B)
    it is the predicted decrease of that loss by the example. Positive helps.

    Steps are kept until ``flush`` writes them, as a part of the log that is complete or absent
    whenever the process ends. One process writes a log at a time.

    Args:
      out: the directory, new or empty.
      sets: names of the K validation sets.
      examples: all training examples, ids or columns {"id": [n], "domain", "size", "excerpt"}, so
        that those without a visit are listed; None: they are taken as they come.
      unit: of the scores, in words.
      options: what tells the run from others, JSON; the report shows it. "steps" may change.
      flush_every: steps that are kept at most.
      resume: go on with what is in ``out``, if there is something.
      step: where to go on: at the step of your checkpoint. What was logged from it on is dropped.
        None: after the last step that was written.

    Used as a context manager, ``finish`` is called at the end, or ``close`` after an exception.

    Attributes:
      step: the step that is to be added next.

    Raises:
      UsageError: a ValueError, one line: ``out`` cannot be used, is of another run, damaged, has
        less than ``step`` steps, or another process writes it.

    >>> import tempfile
    >>> with RunLog(tempfile.mkdtemp(), options={"learning_rate": 0.1}) as log:
    ...     log.add(0, ["a", "b"], np.float32([0.5, -0.25]))
    ...     log.add(1, ["b", "c"], np.float32([0.25, 1.0]))
    ...     log.step
    2
    """

    def __init__(
        self,
        out: str | Path,
        sets: Sequence[str] = ("val",),
        *,
        examples: Mapping[str, Any] | Sequence[Any] | None = None,
        unit: str = "the unit of the scores",
        options: Mapping[str, Any] | None = None,
        flush_every: int = 64,
        resume: bool = False,
        step: int | None = None,
    ):
        self._out, self._sets = Path(out), tuple(sets)
        self._begin, self._flush_every = time.perf_counter(), flush_every
        self._known: frozenset[str] | None = None
        _check_sets(sets)
        if flush_every < 1:
            raise ValueError(f"flush_every must be at least 1, got {flush_every}.")
        if step is not None and not resume:
            raise ValueError("step is where to go on: give resume=True as well.")
        self._examples = Examples(examples)
        options = json.loads(json.dumps(dict(options or {}), allow_nan=False))
        self._held = contextlib.ExitStack()
        is_new = not (self._out / "run.json").exists()
        if is_new:
            files.check_out(self._out)
            files.create_out(self._out)
        elif not resume:
            raise UsageError(
                f"{self._out} has a run: give a new directory, or resume=True to go on with it"
            )
        with self._held, self._disk_errors():
            self._held.enter_context(files.lock(self._out))
            if is_new:
                if step:
                    raise UsageError(f"{self._out}: there is no log yet, so none of {step} steps")
                begun = begun_now(TASK, unit, self._sets)
                begun |= {"examples": self._examples.given, "options": options}
                files.write_json(self._out / "run.json", begun)
                self.step = 0
            else:
                self.step = self._go_on(read_run(self._out), step, options)
            self._writer = LogWriter.resume(self._out, self._sets, self.step)
            self._write_examples()
            self._held = self._held.pop_all()

    def add(
        self,
        step: int,
        ids: Any = None,
        scores: Any = None,
        *,
        loss: Any = None,
        losses: Any = None,
        norms: Any = None,
        errors: Any = None,
        kinds: Mapping[str, Any] | None = None,
        starts: Any = None,
        learning_rate: Any = None,
        domains: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        excerpts: Sequence[str] | None = None,
        **measured: Any,
    ) -> None:
        """Adds a step. Outside ``jax.jit``; nothing is kept of a step that is refused.

        Per validation set means {name: array}, one array with a leading axis K, or one without
        where there is a single set.

        Args:
          step: 0, 1, 2, ...
          ids: [B] strings or integers, which example each row is of; an id may occur several times.
          scores: [B] per validation set; None for a step that was not scored.
          loss: scalar, the mean training loss; by default the mean of ``losses``.
          losses: [B], the rows' own.
          norms: [B], norms of the gradients of these losses over all parameters, not divided by B:
            ``jnp.sqrt(aggregate(squared_norms(loss_fn)(params, batch)))``.
          errors: [B] per validation set, standard errors of the scores; without them, nothing is
            claimed of an example.
          kinds: by kind of layer, [B] per validation set: what its parameters have in the scores,
            as ``by_kind`` gives it of dots in the scale of the scores. All kinds add up to those.
          starts: [B] integers, the first token of a row's window.
          learning_rate: scalar.
          domains, sizes, excerpts: [B], of the rows' examples.
          measured: scalars per validation set, of a scored step: ``val_loss`` before the update,
            ``predicted`` and ``actual`` decrease of it, ``conservation_error``, ``audit_error``
            (NaN: no audit) and ``correlation``; see ``ghostjax.fidelity``.

        Raises:
          ValueError, TypeError: something has another shape, type or name, is not finite, is there
            at some scored steps only, or an id is not among the examples that were given; the step
            is logged already, or not the next one.
          StoppedError: a part cannot be written. The step is kept, ``flush`` can be called again.
        """
        self._check_step(step)
        given = ids, scores, loss, losses, norms, errors, kinds, starts, learning_rate, measured
        outside_jit("scores", given)
        unknown = sorted(set(measured) - {*MEASURED, *CHECKS})
        if unknown:
            raise TypeError(
                f"unknown {', '.join(unknown)}: a step can have {', '.join((*MEASURED, *CHECKS))}."
            )
        if scores is None and (measured or errors is not None or kinds is not None):
            raise ValueError(f"step {step}: a step without scores has no errors and measurements.")
        if ids is None and any(own is not None for own in (scores, losses, norms, starts)):
            raise ValueError(f"step {step}: ids are missing.")
        names, kind = texts_of_ids([] if ids is None else ids)
        count, sets = (len(names),), self._sets
        found = {
            "score": None if scores is None else by_set("scores", scores, sets, count),
            "error": None if errors is None else by_set("errors", errors, sets, count),
            "loss": None if losses is None else numbers("losses", losses, count),
            "norm": None if norms is None else numbers("norms", norms, count),
        }
        for what, own in found.items():
            if own is not None:
                check_finite(f"the {what}", own, names, step)
        for what in ("error", "norm"):
            if found[what] is not None and (found[what] < 0).any():
                raise ValueError(f"step {step}: {what}s must not be negative.")
        parts = {} if kinds is None else parts_by_kind(kinds, found["score"], sets, names)
        mean = np.mean(found["loss"], dtype=np.float64) if losses is not None and count[0] else None
        rate = self._scalar("learning_rate", learning_rate)
        of_step = {"loss": self._scalar("loss", mean if loss is None else loss)}
        for what in (*MEASURED, *CHECKS):
            of_step[what] = self._measurement(what, measured.get(what))
        known = frozenset(name for name in (*MEASURED, "conservation_error") if name in measured)
        given = {"errors": errors, "kinds": kinds}
        known |= {name for name, own in given.items() if own is not None}
        if scores is not None and self._known not in (None, known):
            changed = ", ".join(sorted(self._known ^ known))
            raise ValueError(f"step {step}: give {changed} at all scored steps, or at none.")
        about = {"domain": domains, "size": sizes, "excerpt": excerpts}
        new = self._examples.check(names, kind, about)
        if starts is not None:
            starts = np.asarray(starts)
            if starts.shape != count or starts.dtype.kind not in "iu":
                raise ValueError(f"starts must be integers {list(count)}.")

        if count[0]:
            self._examples.keep(new, kind)
        if scores is not None:
            self._known = known
        nothing = [None] * len(sets)
        common = {"step": step, "learning_rate": rate}
        rows = {name: nothing if own is None else own for name, own in found.items()}
        rows |= {"loss": found["loss"], "norm": found["norm"], "id": names, "start": starts}
        self._writer.append("scores", {**common, **rows})
        self._writer.append("steps", {**common, "undefined": None, **of_step})
        for kind, part in parts.items():
            of_sets = (part * np.sign(found["score"])).sum(1)
            self._writer.append(
                "kinds", {"step": step, "kind": kind, "set": sets, "score": of_sets}
            )
        self.step = step + 1
        if self.step % self._flush_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes the steps so far; when this returns, they are on disk. Before a checkpoint.

        Raises:
          StoppedError: something cannot be written; ``flush`` can be called again.
        """
        with self._disk_errors():
            self._write_examples()
            self._writer.flush(self.step)

    def finish(self) -> None:
        """The run is over: ``flush``, the values and the summary, and ``close``."""
        self.flush()
        if self.step:
            with self._disk_errors():
                write_summary(self._out, time.perf_counter() - self._begin)
        self._held.close()

    def close(self) -> None:
        """``flush``, and lets other processes go on with the log."""
        try:
            self.flush()
        finally:
            self._held.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.finish()
            return
        # The exception says what was wrong. It may have come amid ``add``.
        with contextlib.suppress(StoppedError, ValueError):
            self.close()

    def _go_on(self, done: Run, step: int | None, options: dict[str, Any]) -> int:
        """Checks that it is the log of this run, and drops what is not to be kept."""
        self._check_same(done, options)
        end = done.end if step is None else step
        if not 0 <= end <= done.end:
            raise UsageError(
                f"{self._out}: the log has {done.end} steps, step={step} is not among them: call "
                "flush before a checkpoint is saved, and go on from one that has no more steps"
            )
        # All of it is read before anything is changed.
        steps, kinds, known = done.steps, done.kinds, frozenset()
        if end or (self._out / "examples.parquet").exists():
            visited, known = self._visited(done, end)
            before = Examples.of_run(done, visited)
            if self._examples.given is not None and not before.begins_with(self._examples):
                raise UsageError(f"{self._out}: its examples are not those that are given")
            self._examples = before
        for name in ("summary.json", "values.parquet"):
            (self._out / name).unlink(missing_ok=True)
        cut_log(self._out, self._sets, end)
        if options != done.metadata.get("options"):
            files.write_json(self._out / "run.json", {**done.metadata, "options": options})
        if "score" in known:
            self._known = self._known_of(steps, kinds, end) | (known & {"errors"})
        return end

    def _visited(self, done: Run, end: int) -> tuple[np.ndarray, frozenset[str]]:
        """Which examples a log has up to a step, [n] bool, and whether it has scores and errors."""
        names = {f"score_{self._sets[0]}": "score", f"error_{self._sets[0]}": "errors"}
        visited, known = np.zeros(len(done.ids), bool), set()
        for some in done.visits(*names):
            kept = some["step"] < end
            visited[some["place"][kept]] = True
            known |= {own for name, own in names.items() if np.isfinite(some[name][kept]).any()}
        return visited, frozenset(known)

    def _check_same(self, done: Run, options: dict[str, Any]) -> None:
        if done.metadata.get("task") != TASK:
            raise UsageError(f"{self._out} is a run of ghostjax train: give another directory")
        if done.sets != self._sets:
            raise UsageError(
                f"{self._out} has the validation sets {', '.join(done.sets)}, not "
                f"{', '.join(self._sets)}"
            )
        before = done.metadata.get("options") or {}
        for name in sorted({*before, *options} - {"steps"}):
            if before.get(name) != options.get(name):
                raise UsageError(
                    f"{self._out} is of another run: its {name} is {before.get(name)}, not "
                    f"{options.get(name)}"
                )

    def _known_of(self, steps: Any, kinds: Any, end: int) -> frozenset[str]:
        """What the scored steps of a log have, errors of scores aside."""
        steps, kinds = (each.filter(np.asarray(each["step"]) < end) for each in (steps, kinds))
        columns = {name: f"{name}_{self._sets[0]}" for name in (*MEASURED, "conservation_error")}
        columns = {name: steps[own] for name, own in columns.items()} | {"kinds": kinds["score"]}
        return frozenset(name for name, own in columns.items() if own.null_count < len(own))

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise TypeError(f"step must be an integer, got {type(step).__name__}.")
        if step < self.step:
            raise ValueError(
                f"step {step} is logged already, the next is {self.step}: to make the steps from "
                f"{step} on again, open the log with resume=True, step={step}, which drops them."
            )
        if step > self.step:
            raise ValueError(
                f"expected step {self.step}, got {step}: steps follow each other from 0; one "
                f"without scores is added by add({self.step})."
            )

    def _scalar(self, name: str, value: Any) -> np.ndarray | None:
        if value is None:
            return None
        found = numbers(name, value, ())
        if not np.isfinite(found):
            raise ValueError(f"step {self.step}: {name} is not finite.")
        return found

    def _measurement(self, name: str, value: Any) -> Any:
        if value is None:
            return [None] * len(self._sets)
        found = by_set(name, value, self._sets, ())
        if name == "conservation_error":  # null in the log, and so not measured
            return np.where(np.isnan(found), np.inf, found)
        if name in MEASURED and not np.isfinite(found).all():
            raise ValueError(f"step {self.step}: {name} is not finite.")
        return found

    def _write_examples(self) -> None:
        if self._examples.has_news:
            write_examples(self._out, self._examples.listed)
            self._examples.has_news = False

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        way_out = "call flush again, or open the log with resume=True"
        return files.disk_errors(self._out, lambda: way_out)


def _check_sets(sets: Sequence[str]) -> None:
    if isinstance(sets, str) or not sets or len(set(sets)) < len(sets):
        raise ValueError(f"sets must be different names, at least one: got {sets!r}.")
    for name in sets:
        if not isinstance(name, str) or not SET_NAME.fullmatch(name):
            raise ValueError(f"sets: {name!r} is no name: letters, digits and - (no underscore).")
