"""The values of a run in the terminal."""

import numpy as np
from rich.console import Console
from rich.table import Table

from ghostjax.runs.analysis.domains import by_domain
from ghostjax.runs.analysis.mixture import Share
from ghostjax.runs.analysis.summary import measure_fidelity, run_warnings
from ghostjax.runs.analysis.values import (
    MIN_VISITS,
    By,
    Valued,
    best_and_worst,
    both_ends,
    read_values,
)
from ghostjax.runs.analysis.visits import Visits
from ghostjax.runs.report import output
from ghostjax.runs.store.run import Run

SUMMARY_COUNT = 8  # examples of either end, when a run is over
MAX_DOMAINS = 20  # in the printed table; --csv of rank has every example with its domain


def print_values(
    console: Console,
    about: str,
    valued: Valued,
    *,
    by: By = "value",
    count: int,
    chosen: str = "",
    quiet: bool = False,
) -> None:
    """Prints the ``count`` best and worst examples, the domains, and how many stand out.

    Args:
      about: whose values they are, for the titles.
      chosen: what examples were chosen by; then there is no table of domains.
    """
    ranked = valued.ranked(by)
    measured, _ = ranked.measured(by)
    if chosen:
        about += f", {chosen}"
    for title, indices in best_and_worst(measured, count):
        console.print(_ranking(f"{title}: {about}", ranked, indices, by, console))
    if not chosen:
        per_visit = ", mean and median per visit" if by == "mean" else ""
        console.print(_by_domain(f"By domain: {about}{per_visit}", valued, by, console))
    if not quiet:
        output.print_text(console, f"{standing(valued)}\n")


def print_visits(
    console: Console, what: str, ranked: Valued, found: Visits, count: int, chosen: str = ""
) -> None:
    """Prints the examples with the highest losses, or norms, and those with the lowest.

    Args:
      what: loss or norm.
      ranked, found: the examples that have one, the highest first.
      chosen: what they were chosen by.
    """
    about = f", {chosen}" if chosen else ""
    right = {"justify": "right"}
    columns = {"rank": right, "id": {"max_width": 32}, "domain": {"max_width": 16}}
    columns |= {f"mean {what}": right, "first": right, "last": right, "excerpt": {"ratio": 1}}
    for title, indices in zip(("Highest", "Lowest"), both_ends(ranked, count)):
        table = output.plain_table(f"{title} {what}, mean over visits{about}", columns, console)
        shown = ranked.select(indices)
        for n, name, domain, excerpt in zip(indices, shown.ids, shown.domains, shown.excerpts):
            table.add_row(
                str(n + 1),
                output.plain_cell(name, console),
                output.plain_cell(domain, console),
                *(f"{own[n]:.3f}" if what == "loss" else f"{own[n]:.2e}" for own in found),
                output.plain_cell(excerpt, console),
            )
        if len(indices):
            console.print(table)


def standing(valued: Valued) -> str:
    """How many examples can be told from those without an effect, and how many cannot."""
    apart, told = valued.apart, int(valued.is_told.sum())
    bare = int((valued.visited & ~valued.has_error).sum())
    few = int((valued.visited & ~valued.is_told).sum()) - bare
    unvisited = valued.ids[~valued.visited]
    text = (
        f"Of {told} examples with {MIN_VISITS} visits or more, {apart.sum()} differ from zero by a "
        f"t test at 5%: {(apart & (valued.values > 0)).sum()} help, "
        f"{(apart & (valued.values < 0)).sum()} hurt. Without any effect, one in twenty would."
    )
    if few:
        text += f" {few} have fewer visits, too few to tell."
    if bare:
        text += f" {bare} have no error bar, so nothing can be claimed of them."
    return f"{text} Not visited, so without a value: {len(unvisited)}{output.names(unvisited)}."


def print_warnings(console: Console, run: Run, values: dict[str, Valued]) -> None:
    """Prints why these values should not be trusted."""
    measured = {name: measure_fidelity(run, name, valued) for name, valued in values.items()}
    for warning in run_warnings(run, measured):
        output.print_text(console, f"Warning: {warning}", "bold")


def print_meaning(console: Console, run: Run) -> None:
    """Prints what a value is."""
    text = (
        f"Value: decrease of the validation loss, in {run.unit}, by the example's "
        "share of the updates, summed over its visits; positive helps. Followed by its standard "
        "error, where the log has one."
    )
    output.print_text(console, text, "dim")


def print_mixture(console: Console, shares: list[Share]) -> None:
    """Prints the weights of the domains beside the shares that they had."""
    right = {"justify": "right"}
    columns = {"domain": {"ratio": 1, "min_width": 12}, "share of visits": right}
    columns |= {"value of all visits": right, "weight": right}
    table = output.plain_table("Mixture", columns, console)
    for share in shares[:MAX_DOMAINS]:
        figures = f"{share.visited:.3f}", f"{share.value:+.2e}", f"{share.weight:.3f}"
        table.add_row(output.plain_cell(share.name, console), *figures)
    if len(shares) > MAX_DOMAINS:
        table.caption = f"and {len(shares) - MAX_DOMAINS} more domains with smaller weights"
    console.print(table)


def print_summary(console: Console, run: Run) -> None:
    """Prints the values of a run that is over, their fidelity, and the last losses."""
    summary = run.summary
    for name, valued in read_values(run).items():
        print_values(console, f"validation set {name}", valued, count=SUMMARY_COUNT)
    print_meaning(console, run)
    for name, auc in (summary["auc"] or {}).items():
        line = f"AUC of {name} above all else, by value for validation set {name}: {auc:.3f}"
        output.print_text(console, line)
    for warning in summary["warnings"]:
        output.print_text(console, f"Warning: {warning}", "bold")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in summary["val_loss"].items())
    cost = summary.get("cost")
    if cost:
        every = "every step" if cost["score_every"] == 1 else f"1 step in {cost['score_every']}"
        output.print_text(
            console,
            f"A scored step took {1e3 * cost['scored_step']:.1f} ms, a step of plain training "
            f"{1e3 * cost['plain_step']:.1f} ms: a run that scores {every} "
            f"costs {cost['ratio']:.2f} times plain training. --score-every lowers it.",
        )
    output.print_text(console, f"loss {summary['loss']:.3f}  validation loss {losses}")


def _ranking(title: str, ranked: Valued, indices: np.ndarray, by: By, console: Console) -> Table:
    columns = {
        "rank": {"justify": "right"},
        "id": {"max_width": 32},
        "domain": {"max_width": 16},
        "value" if by == "value" else "value per visit": {"justify": "right"},
        "visits": {"justify": "right"},
        "excerpt": {"ratio": 1},
    }
    table = output.plain_table(title, columns, console)
    shown = ranked.select(indices)
    texts = zip(indices, shown.ids, shown.domains, shown.excerpts)
    for (index, name, domain, excerpt), value, error, visits in zip(
        texts, *shown.measured(by), shown.visits
    ):
        table.add_row(
            str(index + 1),
            output.plain_cell(name, console),
            output.plain_cell(domain, console),
            output.with_error(value, error, console),
            str(visits),
            output.plain_cell(excerpt, console),
        )
    return table


def _by_domain(title: str, valued: Valued, by: By, console: Console) -> Table:
    right = {"justify": "right"}
    columns = {"domain": {"ratio": 1, "min_width": 12}, "examples": right, "visits": right}
    columns |= {"sum": right, "mean": right, "median": right, "helped": right}
    table = output.plain_table(title, columns, console)
    found = by_domain(valued, by)
    for one in found[:MAX_DOMAINS]:
        some = len(one.measured) > 0
        table.add_row(
            output.plain_cell(one.name, console),
            str(one.examples),
            str(one.visits),
            *(f"{each:+.2e}" if some else "-" for each in (one.total, one.mean, one.median)),
            f"{one.helped:.0%}" if some else "-",
        )
    if len(found) > MAX_DOMAINS:
        table.caption = f"and {len(found) - MAX_DOMAINS} more domains with lower means"
    return table
