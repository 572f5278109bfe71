"""``ghostjax rank``: the training examples that helped most and those that hurt most."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ghostjax.runs import output
from ghostjax.runs.config import UsageError
from ghostjax.runs.ranking import (
    By,
    Valued,
    best_and_worst,
    both_ends,
    check_choice,
    check_count,
    check_formats,
    is_finished,
    progress_note,
    read_values,
    unit,
)
from ghostjax.runs.reading import read_run

DEFAULT_COUNT = 10
MAX_DOMAINS = 20  # in the printed table; --csv has every example with its domain

COLUMNS = (
    "set",
    "rank",
    "id",
    "domain",
    "visits",
    "value",
    "error",
    "mean",
    "mean_error",
    "excerpt",
)


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Lists the training examples that helped most and those that hurt most.

    Reads a run directory and changes nothing in it. Of a run that goes on, it lists the values so
    far.

        ghostjax rank run
        ghostjax rank run --set prose --domain wiki --count 5
        ghostjax rank run --by mean --csv > values.csv
        ghostjax rank run --json | jq -r '.[] | select(.value < -2 * .error) | .id'

    The value of an example sums, over its visits, the decrease of the validation loss by its share
    of the update. Positive helps. What follows the value is its standard error: how much it would
    vary with other validation rows.

    --csv and --json print one row per example and validation set, with all digits, best first:
    set, rank, id, domain, visits, value, error, mean (value per visit), mean_error and excerpt.
    Examples that were not visited come last and have no rank.

    Attributes:
      run: The run directory.
      set: The validation set to rank for. None: each of them.
      domain: Only the examples of this domain.
      count: How many examples of either end. None: 10; with --csv or --json, all examples.
      by: value: the sum over the visits; mean: the value per visit.
      csv: Print CSV.
      json: Print JSON.
      quiet: Print the tables without notes.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
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


def run(config: RankConfig) -> None:
    """Prints the ranking.

    Raises:
      UsageError: an option, or the run directory, cannot be used.
    """
    config.check()
    source = read_run(config.run)
    check_choice("validation set", config.set, list(source.sets))
    values = read_values(source)
    if config.set is not None:
        values = {config.set: values[config.set]}
    if config.domain is not None:
        domains = sorted(set(source.examples["domain"].to_pylist()))
        check_choice("domain", config.domain, domains)
        values = {
            name: valued.select(valued.domains == config.domain) for name, valued in values.items()
        }
    if not any(valued.visits.any() for valued in values.values()):
        which = f" of domain {config.domain}" if config.domain is not None else ""
        raise UsageError(f"{config.run}: none of the examples{which} was visited so far")

    if config.csv:
        output.print_csv(COLUMNS, _rows(values, config))
    elif config.json:
        output.print_json(list(_rows(values, config)))
    else:
        console = output.make_console(sys.stdout)
        for name, valued in values.items():
            _print_set(name, valued, config, console)
        if not config.quiet:
            if not is_finished(source):
                console.print(progress_note(source), markup=False)
            console.print(
                output.encodable(
                    f"Value: decrease of the validation loss, in {output.plain(unit(source))}, by "
                    "the example's share of the updates, summed over its visits; positive helps. "
                    "Followed by its standard error.",
                    console,
                ),
                style="dim",
                markup=False,
            )


def _rows(values: dict[str, Valued], config: RankConfig) -> Iterator[dict[str, Any]]:
    for name, valued in values.items():
        ranked = valued.ranked(config.by)
        chosen = np.arange(len(ranked))
        unvisited = valued.select(valued.visits == 0)
        if config.count is not None:
            first, last = both_ends(ranked, config.count)
            chosen, unvisited = np.concatenate([first, last[::-1]]), unvisited.select(slice(0))
        for part, ranks in ((ranked, chosen), (unvisited, np.arange(len(unvisited)))):
            means, mean_errors = part.measured("mean")
            for index in ranks:
                yield {
                    "set": name,
                    "rank": int(index) + 1 if part is ranked else None,
                    "id": part.ids[index],
                    "domain": part.domains[index],
                    "visits": part.visits[index],
                    "value": part.values[index],
                    "error": part.errors[index],
                    "mean": means[index],
                    "mean_error": mean_errors[index],
                    "excerpt": part.excerpts[index],
                }


def _print_set(name: str, valued: Valued, config: RankConfig, console: Console) -> None:
    ranked = valued.ranked(config.by)
    measured, errors = ranked.measured(config.by)
    about = f"validation set {name}"
    if config.domain is not None:
        about += f", domain {config.domain}"
    per_visit = ", mean and median per visit" if config.by == "mean" else ""
    for title, indices in best_and_worst(measured, config.count or DEFAULT_COUNT):
        console.print(_ranking(f"{title}: {about}", ranked, indices, config.by, console))
    if config.domain is None:
        console.print(_by_domain(f"By domain: {about}{per_visit}", valued, config.by, console))
    if not config.quiet:
        apart = np.abs(measured) > 2 * errors
        console.print(
            f"{apart.sum()} of {len(ranked)} examples differ from zero by more than two standard "
            f"errors: {(apart & (measured > 0)).sum()} help, {(apart & (measured < 0)).sum()} "
            f"hurt. Not visited: {len(valued) - len(ranked)}.\n"
        )


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
    measured, errors = ranked.measured(by)
    for index in indices:
        table.add_row(
            str(index + 1),
            output.plain_cell(ranked.ids[index], console),
            output.plain_cell(ranked.domains[index], console),
            output.with_error(measured[index], errors[index], console),
            str(ranked.visits[index]),
            output.plain_cell(ranked.excerpts[index], console),
        )
    return table


def _by_domain(title: str, valued: Valued, by: By, console: Console) -> Table:
    right = {"justify": "right"}
    columns = {"domain": {"ratio": 1, "min_width": 12}, "examples": right, "visits": right}
    columns |= {"sum": right, "mean": right, "median": right, "helped": right}
    table = output.plain_table(title, columns, console)
    found = []
    for domain, part in valued.by_domain().items():
        measured = part.ranked(by).measured(by)[0]
        found.append((-np.mean(measured) if len(measured) else np.inf, domain, part, measured))
    found.sort(key=lambda entry: entry[:2])
    for _, domain, part, measured in found[:MAX_DOMAINS]:
        some = len(measured) > 0
        table.add_row(
            output.plain_cell(domain, console),
            str(len(part)),
            str(part.visits.sum()),
            f"{part.values.sum():+.2e}" if some else "-",
            f"{measured.mean():+.2e}" if some else "-",
            f"{np.median(measured):+.2e}" if some else "-",
            f"{(measured > 0).mean():.0%}" if some else "-",
        )
    if len(found) > MAX_DOMAINS:
        table.caption = f"and {len(found) - MAX_DOMAINS} more domains with lower means"
    return table
