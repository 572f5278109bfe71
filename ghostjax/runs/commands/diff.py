"""``ghostjax diff``: what changed between two runs, and how much of it is within the errors."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from ghostjax.runs.analysis.compare import Comparison, compare, differing_fingerprints
from ghostjax.runs.analysis.values import (
    MIN_VISITS,
    By,
    read_values,
)
from ghostjax.runs.commands.options import check_choice, check_count, check_formats
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import output
from ghostjax.runs.store.run import Run, read_run

DEFAULT_COUNT = 10
_BLOCK = 2**10  # examples of which rows are made together


@dataclasses.dataclass(frozen=True)
class DiffConfig:
    """Compares the values of the training examples in two runs.

    Matches the examples by id and says which changed their sign or rank, and how much of that is
    within the error bars: a change counts as beyond them if it differs from zero by a t test at 5%,
    with the root of the summed squares of the two values' errors; and nothing is claimed of
    examples with fewer than 8 visits in either run. Changes nothing in the runs.

        ghostjax diff run-a run-b
        ghostjax diff run-a run-b --set prose --by mean
        ghostjax diff run-a run-b --csv > changes.csv
        ghostjax diff run-a run-b --json | jq '.sets.prose.correlation'

    --csv prints one row per example and validation set, with all digits, the largest change (in
    standard errors; without these, as it is) first; then the examples that only one run visited,
    with empty cells for the other. verdict_a and verdict_b are those of ghostjax rank, or absent;
    beyond_errors is empty where there are too few visits, or no errors, to tell.
    --json prints the figures and, under examples, the same rows.

    The exit code is 0 whether or not the runs differ.

    Attributes:
      run_a: A run directory.
      run_b: The run directory to compare with it.
      set: The validation set to compare for. None: every one that both runs have.
      domain: Only the examples that have this domain in either run.
      count: How many examples. None: 10; with --csv or --json, all examples.
      by: value: the sum over the visits; mean: the value per visit, for runs of unequal length.
      csv: Print CSV.
      json: Print JSON.
      quiet: Print the figures and tables without notes.
    """

    run_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")]
    run_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")]
    set: str | None = None
    domain: str | None = None
    count: int | None = None
    by: By = "value"
    csv: bool = False
    json: bool = False
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        check_count(self.count)
        check_formats(self.csv, self.json)


def run(config: DiffConfig) -> None:
    """Prints the comparison.

    Raises:
      UsageError: an option, or a run directory, cannot be used; or the runs share no validation
        set or no example that both visited.
    """
    config.check()
    a, b = read_run(config.run_a), read_run(config.run_b)
    compared = _compare(a, b, config)
    if config.csv:
        rows = (row for name, found in compared.items() for row in _rows(name, found, config))
        output.print_csv(rows)
    elif config.json:
        output.print_json(
            {
                "run_a": str(config.run_a),
                "run_b": str(config.run_b),
                "by": config.by,
                "finished": [a.is_finished, b.is_finished],
                "differing_fingerprints": differing_fingerprints(a.metadata, b.metadata),
                "sets": {
                    name: {**found.summary(), "examples": _rows(name, found, config)}
                    for name, found in compared.items()
                },
            }
        )
    else:
        console = output.make_console(sys.stdout)
        if not config.quiet:
            for line in _notes(a, b):
                output.print_text(console, line)
        for name, found in compared.items():
            _print_set(name, found, config, console)


def _compare(a: Run, b: Run, config: DiffConfig) -> dict[str, Comparison]:
    shared = [name for name in a.sets if name in b.sets]
    if not shared:
        first, second = (", ".join(run.sets) for run in (a, b))
        raise UsageError(f"the runs share no validation set: {first} in A, {second} in B")
    check_choice("validation set", config.set, shared)
    values = [read_values(run) for run in (a, b)]
    if config.domain is not None:
        texts = (next(iter(found.values())).domains for found in values)
        domains = {name for own in texts for name in pa.array(own).unique().to_pylist()}
        check_choice("domain", config.domain, sorted(domains))
        values = [
            {name: valued.select(valued.domains == config.domain) for name, valued in found.items()}
            for found in values
        ]
    chosen = shared if config.set is None else [config.set]
    compared = {name: compare(values[0][name], values[1][name], config.by) for name in chosen}
    if not any(len(found.a) for found in compared.values()):
        raise UsageError("the runs share no example that both have visited")
    return compared


def _notes(a: Run, b: Run) -> Iterator[str]:
    for letter, source in (("A", a), ("B", b)):
        yield f"{letter}: {source.path}, {source.end} steps"
        if not source.is_finished:
            yield f"   {output.progress_note(source)}"
    different = differing_fingerprints(a.metadata, b.metadata)
    if different:
        what = " and ".join({"params": "initial parameters"}.get(name, name) for name in different)
        yield f"The runs differ in their {what}."
    for letter, one, other in (("A", a, b), ("B", b, a)):
        alone = [name for name in one.sets if name not in other.sets]
        if alone:
            yield f"Only {letter} has the validation sets: {', '.join(alone)}."


def _rows(name: str, found: Comparison, config: DiffConfig) -> Iterator[dict[str, Any]]:
    columns = {
        "id": found.a.ids,
        "domain": found.a.domains,
        "visits_a": found.a.visits,
        "visits_b": found.b.visits,
        "value_a": found.value_a,
        "error_a": found.error_a,
        "value_b": found.value_b,
        "error_b": found.error_b,
        "change": found.change,
        "change_error": found.error,
        "beyond_errors": np.where(found.is_told, found.beyond, None),
        "verdict_a": found.a.verdicts,
        "verdict_b": found.b.verdicts,
        "sign_changed": found.sign_changed,
        "rank_a": found.rank_a,
        "rank_b": found.rank_b,
    }
    order = found.largest()[: config.count]
    for start in range(0, len(order), _BLOCK):
        some = order[start : start + _BLOCK]
        for row in zip(*(own[some] for own in columns.values()), strict=True):
            yield {"set": name, **dict(zip(columns, row, strict=True))}
    if config.count is not None:
        return
    absences = {"a": found.missing_b, "b": found.missing_a}
    for letter, alone in (("a", found.only_a), ("b", found.only_b)):
        other = "b" if letter == "a" else "a"
        own = {
            "id": alone.ids,
            "domain": alone.domains,
            f"visits_{letter}": alone.visits,
            **dict(zip((f"value_{letter}", f"error_{letter}"), alone.measured(config.by))),
            f"verdict_{letter}": alone.verdicts,
            f"verdict_{other}": absences[letter],
        }
        for row in zip(*own.values(), strict=True):
            yield {"set": name} | dict.fromkeys(columns) | dict(zip(own, row, strict=True))


def _print_set(name: str, found: Comparison, config: DiffConfig, console: Console) -> None:
    figures = found.summary()
    output.print_text(console, f"Validation set {name}", "bold")
    if not figures["compared"]:
        console.print("No example was visited in both runs.\n")
        return
    count = figures["compared"]
    lines = [f"{count} examples visited in both runs" + _alone(found)]
    bare = int((~found.a.has_error | ~found.b.has_error).sum())
    few = count - figures["told"] - bare
    if bare:
        lines.append(
            f"{bare} have no error bar in a run: nothing can be claimed of their changes, and they "
            "count as within the error bars"
        )
    if few:
        lines.append(
            f"{few} have fewer than {MIN_VISITS} visits in a run, too few to "
            "tell: they count as within the error bars"
        )
    lines.append(f"rank correlation {figures['correlation']:.3f} (Spearman)")
    if not bare:
        lines[-1] += (
            f"; the error bars alone would leave about {figures['expected_correlation']:.3f}"
        )
    for what, label in (("sign_changed", "sign"), ("rank_changed", "rank")):
        changed, beyond = figures[what], figures[f"{what}_beyond_errors"]
        lines.append(
            f"{changed} changed {label}: {changed - beyond} within the error bars, {beyond} beyond"
        )
    lines[-1] += f"; median change of rank {figures['median_rank_change']:g}"
    for line in lines:
        output.print_text(console, f"  {line}")
    largest = found.largest()
    significant = largest[found.beyond[largest]]
    if len(significant):
        title = f"Largest of {len(significant)} changes beyond the error bars"
        shown = significant[: config.count or DEFAULT_COUNT]
        console.print(_table(title, found, shown, console))
    elif bare < count:
        console.print("  No value changed beyond its error bars.")
    else:
        title = "Largest changes, without error bars"
        console.print(_table(title, found, largest[: config.count or DEFAULT_COUNT], console))
    if not config.quiet:
        meaning = (
            f"Value{'' if config.by == 'value' else ' per visit'}: decrease of the validation loss "
            "by the example, in A and in B, followed by its standard error; rank 1 is the most "
            "helpful of the compared."
        )
        output.print_text(console, meaning, "dim")
        console.print()


def _alone(found: Comparison) -> str:
    """How many examples only one run visited, and which."""
    parts = []
    for letter, alone in (("A", found.only_a), ("B", found.only_b)):
        if len(alone):
            parts.append(f"{len(alone)} only in {letter}{output.names(alone.ids)}")
    if found.unvisited:
        parts.append(f"{len(found.unvisited)} visited in neither{output.names(found.unvisited)}")
    return "; " + "; ".join(parts) if parts else ""


def _table(title: str, found: Comparison, indices: np.ndarray, console: Console) -> Table:
    right = {"justify": "right"}
    columns = {"id": {"ratio": 1}, "domain": {"max_width": 16}, "A": right, "B": right}
    columns |= {"change": right, "sign": right, "rank": right}
    table = output.plain_table(title, columns, console)
    for n in indices:
        table.add_row(
            output.plain_cell(found.a.ids[n], console),
            output.plain_cell(found.a.domains[n], console),
            output.with_error(found.value_a[n], found.error_a[n], console),
            output.with_error(found.value_b[n], found.error_b[n], console),
            f"{found.change[n]:+.2e}",
            "changed" if found.sign_changed[n] else "same",
            f"{found.rank_a[n]:g} to {found.rank_b[n]:g}",
        )
    return table
