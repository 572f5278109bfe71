"""What a training run prints on its way."""

import time
from typing import Any

import numpy as np
from rich import progress
from rich.console import Console

from ghostjax.runs.training.trainer import Step

PLAIN_LINES = 10  # where there is no bar


class Progress:
    """Shows losses and speed: a bar on a terminal, else some lines; nothing without a console.

    The speed counts training rows and leaves out the first step, which compiles.
    """

    def __init__(self, console: Console | None, start: int, total: int, batch_size: int):
        self._console = console
        self._start, self._total, self._batch_size = start, total, batch_size
        self._begin = 0.0
        self._losses = ""
        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(),
        ]
        is_shown = console is not None and console.is_terminal
        self._bar = progress.Progress(*columns, console=console, disable=not is_shown)
        self._task = self._bar.add_task("compiling", total=total, completed=start, status="")

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.__exit__(*exception)

    def step(self, step: Step) -> None:
        """A step was made."""
        done, total = step.number + 1, self._total
        is_first = step.number == self._start
        if is_first:
            self._begin = time.perf_counter()
        losses = step.record.steps["val_loss"]
        if np.isfinite(losses).all():  # else the step was not scored
            self._losses = "  validation loss " + "/".join(f"{loss:.3f}" for loss in losses)
        status = f"loss {step.record.steps['loss']:.3f}{self._losses}"
        if not is_first:
            rows = (step.number - self._start) * self._batch_size
            status += f"  {rows / (time.perf_counter() - self._begin):.0f} rows/s"
        self._bar.update(self._task, advance=1, status=status, description="training")
        if self._console is None or self._console.is_terminal:
            return
        if is_first or done * PLAIN_LINES // total > step.number * PLAIN_LINES // total:
            self._console.print(f"step {done}/{total}  {status}", markup=False)
