"""What a training run prints: progress on the way, tables at the end."""

import time
from typing import Any

import numpy as np
from rich import progress
from rich.console import Console

from ghostjax.runs import output
from ghostjax.runs.ranking import Valued, read_values
from ghostjax.runs.reading import Run
from ghostjax.runs.training import Step

ROWS = 8  # examples in each of the two tables
PLAIN_LINES = 10  # of progress, where there is no bar


class Progress:
    """Shows losses and speed: a bar on a terminal, else some lines; nothing without a console.

    The speed counts training rows and leaves out the first step, which compiles.
    """

    def __init__(self, console: Console | None, start: int, total: int, batch_size: int):
        self._console = console
        self._start, self._total, self._batch_size = start, total, batch_size
        self._begin = 0.0
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
        losses = "/".join(f"{loss:.3f}" for loss in step.record.val_loss)
        status = f"loss {step.record.loss:.3f}  validation loss {losses}"
        if not is_first:
            rows = (step.number - self._start) * self._batch_size
            status += f"  {rows / (time.perf_counter() - self._begin):.0f} rows/s"
        self._bar.update(self._task, advance=1, status=status, description="training")
        if self._console is None or self._console.is_terminal:
            return
        if is_first or done * PLAIN_LINES // total > step.number * PLAIN_LINES // total:
            self._console.print(f"step {done}/{total}  {status}", markup=False)


def print_summary(console: Console, run: Run) -> None:
    """Prints the most helpful and most harmful examples, values by domain, and the fidelity."""
    summary = run.summary
    for name, valued in read_values(run).items():
        about = f" for validation set {name}" if len(run.sets) > 1 else ""
        ranked = valued.ranked()
        _print_ranking(console, f"Most helpful examples{about}", ranked, np.arange(ROWS))
        worst = np.arange(len(ranked))[::-1][:ROWS]
        harmful = worst[ranked.values[worst] < 0]
        if len(harmful):
            _print_ranking(console, f"Most harmful examples{about}", ranked, harmful)
        else:
            title = f"Least helpful examples{about} (none has a negative value)"
            _print_ranking(console, title, ranked, worst)
        _print_domains(console, f"Value by domain{about}", summary["domains"][name])
    console.print(
        f"Value: predicted decrease of the validation loss ({summary['unit']}) by the example's "
        "share of the optimizer's updates, summed over its visits; positive helps.",
        style="dim",
        markup=False,
    )
    for name, auc in (summary["auc"] or {}).items():
        line = f"AUC of {name} above all else, by value for validation set {name}: {auc:.3f}"
        console.print(output.encodable(line, console), markup=False)
    for warning in summary["warnings"]:
        console.print(f"Warning: {warning}", style="bold", markup=False)
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in summary["val_loss"].items())
    console.print(f"loss {summary['loss']:.3f}  validation loss {losses}", markup=False)


def _print_ranking(console: Console, title: str, ranked: Valued, indices: np.ndarray) -> None:
    columns = {
        "id": {"max_width": 32},
        "domain": {"max_width": 16},
        "value": {"justify": "right"},
        "excerpt": {"ratio": 1},
    }
    table = output.plain_table(title, columns, console)
    chosen = ranked.select(indices[indices < len(ranked)])
    for place in range(len(chosen)):
        table.add_row(
            output.plain_cell(chosen.ids[place], console),
            output.plain_cell(chosen.domains[place], console),
            output.with_error(chosen.values[place], chosen.errors[place], console),
            output.plain_cell(chosen.excerpts[place], console),
        )
    console.print(table)


def _print_domains(console: Console, title: str, domains: dict[str, dict[str, Any]]) -> None:
    names = ("examples", "visits", "value", "mean value")
    columns = {"domain": {}, **{name: {"justify": "right"} for name in names}}
    table = output.plain_table(title, columns, console)
    table.expand = False
    for domain, figures in domains.items():
        mean = figures["mean"]
        table.add_row(
            output.plain_cell(domain, console),
            str(figures["examples"]),
            str(figures["visits"]),
            f"{figures['value']:+.3g}",
            "-" if mean is None else f"{mean:+.3g}",
        )
    console.print(table)
