"""What a run prints: progress on the way, tables at the end; and the numbers in them."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ghostjax.runs.documents import Document
from ghostjax.runs.output import make_console as make_console
from ghostjax.runs.output import plain_cell as _plain
from ghostjax.runs.statistics import roc_auc as roc_auc
from ghostjax.runs.training import Visits

ROWS = 8  # documents in each of the two tables
PLAIN_LINES = 10  # of progress, where there is no bar


def scores_by_domain(
    domains: Sequence[str], scores: np.ndarray, visits: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Per domain: documents, visits, score (their sum) and mean_score (per visited document).

    ``mean_score`` is None where no document was visited.
    """
    found = {}
    for domain in sorted(set(domains)):
        mask = np.array(domains) == domain
        visited = mask & (visits > 0)
        found[domain] = {
            "documents": int(mask.sum()),
            "visits": int(visits[mask].sum()),
            "score": float(scores[mask].sum()),
            "mean_score": float(scores[visited].mean()) if visited.any() else None,
        }
    return found


def prose_above_code(
    domains: Sequence[str], scores: np.ndarray, visits: np.ndarray
) -> float | None:
    """ROC AUC of the scores for telling prose from code, over the documents that were visited.

    None when the domains are not exactly prose and code, or one of them was not visited.
    """
    if set(domains) != {"prose", "code"}:
        return None
    prose = np.array(domains) == "prose"
    visited = visits > 0
    if not (prose & visited).any() or not (~prose & visited).any():
        return None
    return roc_auc(scores[prose & visited], scores[~prose & visited])


def follow(steps: Iterable[Visits], total: int, batch_size: int, console: Console) -> list[Visits]:
    """Runs the steps and shows their losses and speed: a bar on a terminal, else some lines.

    The speed counts training rows and leaves out the first step, which compiles.
    """
    done = []
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=total, status="")
        begin = time.perf_counter()
        for visits in steps:
            done.append(visits)
            if len(done) == 1:
                begin = time.perf_counter()
            status = f"loss {visits.loss:.3f}  validation loss {visits.val_loss:.3f}"
            if len(done) > 1:
                speed = (len(done) - 1) * batch_size / (time.perf_counter() - begin)
                status += f"  {speed:.0f} rows/s"
            progress.update(task, advance=1, status=status, description="training")
            lines = len(done) * PLAIN_LINES // total - (len(done) - 1) * PLAIN_LINES // total
            if not console.is_terminal and (len(done) == 1 or lines):
                console.print(f"step {len(done)}/{total}  {status}", markup=False)
    return done


def print_report(
    console: Console,
    documents: Sequence[Document],
    scores: np.ndarray,
    visits: np.ndarray,
    summary: dict[str, Any],
) -> None:
    """Prints the most helpful and most harmful documents and the score by domain."""
    visited = np.flatnonzero(visits)
    order = visited[np.argsort(-scores[visited], kind="stable")]
    console.print(_ranking("Most helpful documents", documents, scores, order[:ROWS], console))
    worst = order[::-1][:ROWS]
    harmful = worst[scores[worst] < 0]
    if len(harmful):
        console.print(_ranking("Most harmful documents", documents, scores, harmful, console))
    else:
        title = "Least helpful documents (none has a negative score)"
        console.print(_ranking(title, documents, scores, worst, console))

    table = Table(title="Score by domain", title_justify="left")
    table.add_column("domain")
    for name in ("documents", "visits", "score", "mean score"):
        table.add_column(name, justify="right")
    for domain, values in summary["domains"].items():
        mean = values["mean_score"]
        table.add_row(
            _plain(domain, console),
            str(values["documents"]),
            str(values["visits"]),
            f"{values['score']:+.3g}",
            "-" if mean is None else f"{mean:+.3g}",
        )
    console.print(table)
    console.print(
        "Score: first-order decrease of the validation loss (nats per token) by the document's "
        "share of the optimizer's updates, summed over its visits; positive helps.",
        style="dim",
    )
    line = f"loss {summary['loss']:.3f}  validation loss {summary['val_loss']:.3f}"
    if summary["auc"] is not None:
        line += f"  AUC of prose above code {summary['auc']:.3f}"
    console.print(line)


def _ranking(title, documents, scores, indices, console: Console) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("id", no_wrap=True, max_width=32)
    table.add_column("domain", no_wrap=True, max_width=16)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("excerpt", no_wrap=True, ratio=1)
    for index in indices:
        document = documents[index]
        table.add_row(
            _plain(document.id, console),
            _plain(document.domain, console),
            f"{scores[index]:+.2e}",
            _plain(document.excerpt(), console),
        )
    return table
