"""``ghostjax duplicates``: groups of training examples that are alike, and their values."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from ghostjax.runs.analysis.duplicates import duplicates, jaccard
from ghostjax.runs.analysis.values import Valued, read_values
from ghostjax.runs.commands.filters import Filter
from ghostjax.runs.commands.options import (
    check_choice,
    check_count,
    check_formats,
    check_similarity,
)
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.report import output
from ghostjax.runs.store.run import Run, read_run

DEFAULT_COUNT = 10
MAX_MEMBERS = 8  # of a group, in the printed tables
_BLOCK = 2**8  # groups whose rows are made together


@dataclasses.dataclass(frozen=True)
class DuplicatesConfig(Filter):
    """Lists groups of training examples that are duplicates or nearly so, with their values.

        ghostjax duplicates run
        ghostjax duplicates run --set prose --similarity 0.95
        ghostjax duplicates run --domain wiki --csv > duplicates.csv
        ghostjax duplicates run --json | jq -r '.[] | select(.similarity < 1) | .id'

    Two examples are alike by the share of what either has that both have (Jaccard): of texts,
    stretches of eight bytes, where upper and lower case and all blanks are the same; of arrays,
    numbers at their places, but for the labels of classes. A group holds what is linked by pairs
    of at least --similarity. Pairs are found by MinHash and then measured exactly: one of
    similarity .7 or more is missed once in 6000, one of .6 once in 85.

    It needs the files that the run was started with, and about 256 bytes of memory per example.

    --csv and --json print one row per validation set and example in a group, the largest groups
    first: set, group (from 1), size (of the group), group_value (the sum of its values), id,
    domain, similarity (to the first of the group), visits, value, error, verdict and excerpt.

    Attributes:
      set: The validation set whose values are listed. None: each of them.
      similarity: How much the examples of a pair must share at least, from 0.6 to 1.
      count: How many groups. None: 10; with --csv or --json, all of them.
      csv: Print CSV.
      json: Print JSON.
      quiet: Print the tables without notes.
    """

    set: str | None = None
    similarity: float = 0.8
    count: int | None = None
    csv: bool = False
    json: bool = False
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        super().check()
        check_count(self.count)
        check_formats(self.csv, self.json)
        check_similarity("similarity", self.similarity)


def run(config: DuplicatesConfig) -> None:
    """Prints the groups.

    Raises:
      UsageError: an option, the run directory or its data cannot be used.
    """
    config.check()
    source = read_run(config.run)
    check_choice("validation set", config.set, list(source.sets))
    values = read_values(source)
    first = next(iter(values.values()))
    chosen = np.flatnonzero(config.mask(first))
    _, task = read_task(source)
    found = duplicates(len(chosen), lambda n: task.elements(chosen[n]), config.similarity)
    values = {name: own for name, own in values.items() if config.set in (None, name)}
    shown = config.count
    if shown is None and not (config.csv or config.json):
        shown = DEFAULT_COUNT
    groups = [Group.of(chosen[members], task) for members in found[:shown]]
    rows = (row for name, valued in values.items() for row in _rows(name, valued, groups))
    if config.csv:
        output.print_csv(rows, COLUMNS)
        return
    if config.json:
        output.print_json(rows)
        return
    console = output.make_console(sys.stdout)
    for number, group in enumerate(groups, 1):
        console.print(_table(number, group, values, console))
    if not config.quiet:
        output.print_text(console, _told(source, config, len(chosen), list(map(len, found))))


class Group(NamedTuple):
    """Examples by their numbers [n], and how alike each is to the first of them [n]."""

    members: np.ndarray
    similarities: np.ndarray

    @classmethod
    def of(cls, members: np.ndarray, task: LoadedTask) -> "Group":
        first = task.elements(members[0])
        return cls(members, np.array([jaccard(first, task.elements(n)) for n in members]))

    def value(self, valued: Valued) -> float:
        """The sum of those of the members that were visited; NaN without any."""
        own = valued.select(self.members)
        return float(own.values[own.visited].sum()) if own.visited.any() else math.nan


COLUMNS = (
    *("set", "group", "size", "group_value", "id", "domain"),
    *("similarity", "visits", "value", "error", "verdict", "excerpt"),
)


def _rows(name: str, valued: Valued, groups: list[Group]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(groups), _BLOCK):
        some = groups[start : start + _BLOCK]
        # Together, as excerpts are read with what is near them in the file.
        own = valued.select(np.concatenate([group.members for group in some]))
        of_groups = (
            (*of_group, similarity)
            for number, group in enumerate(some, start + 1)
            for of_group in [(name, number, len(group.members), group.value(valued))]
            for similarity in group.similarities
        )
        numbers = own.visits, own.values, own.errors
        columns = of_groups, own.ids, own.domains, *numbers, own.verdicts, own.excerpts
        for (*of_group, similarity), one, domain, *more in zip(*columns, strict=True):
            row = *of_group, one, domain, similarity, *more
            yield dict(zip(COLUMNS, row, strict=True))


def _table(number: int, group: Group, values: dict[str, Valued], console: Console) -> Table:
    right = {"justify": "right"}
    columns = {"id": {"max_width": 32}, "domain": {"max_width": 16}, "similarity": right}
    columns |= {"visits": right, **{f"value: {name}": right for name in values}}
    title = f"Group {number}: {len(group.members)} examples"
    table = output.plain_table(title, {**columns, "excerpt": {"ratio": 1}}, console)
    first = next(iter(values.values())).select(group.members[:MAX_MEMBERS])
    about = zip(first.ids, first.domains, first.visits, first.excerpts)
    for (name, domain, visits, excerpt), n, similarity in zip(about, *group):
        table.add_row(
            output.plain_cell(name, console),
            output.plain_cell(domain, console),
            f"{similarity:.2f}",
            str(visits),
            *(
                output.with_error(own.values[n], own.errors[n], console) if own.visits[n] else "-"
                for own in values.values()
            ),
            output.plain_cell(excerpt, console),
        )
    sums = {name: group.value(own) for name, own in values.items()}
    told = [f"{name} {value:+.2e}" for name, value in sums.items() if math.isfinite(value)]
    caption = f"value of the group: {', '.join(told) or 'none was visited'}"
    if len(group.members) > MAX_MEMBERS:
        caption = f"and {len(group.members) - MAX_MEMBERS} more, which --csv has; {caption}"
    table.caption = output.encodable(caption, console)
    return table


def _told(source: Run, config: DuplicatesConfig, count: int, sizes: list[int]) -> str:
    which = f" of {config.words}" if config.words else ""
    alike = f"alike to {config.similarity:g} or more"
    if not sizes:
        return f"Of {count} examples{which}, none are {alike}."
    members, many = sum(sizes), len(sizes)
    return (
        f"Of {count} examples{which}, {members} are in {many} group{'s' * (many > 1)} of examples "
        f"that are {alike}; with one of each group, {members - many} would be left out. Values are "
        f"in {source.unit}."
    )
