"""``ghostjax rank``: the training examples that helped most and those that hurt most."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ghostjax.runs.analysis.mixture import domain_mixture
from ghostjax.runs.analysis.values import (
    By,
    Valued,
    both_ends,
    read_values,
)
from ghostjax.runs.commands.options import check_choice, check_count, check_formats
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import output
from ghostjax.runs.report.terminal import (
    print_meaning,
    print_mixture,
    print_values,
    print_warnings,
)
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import read_run

DEFAULT_COUNT = 10


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Lists the training examples that helped most and those that hurt most.

    Reads a run directory and changes nothing in it. Of a run that goes on, it lists the values so
    far.

        ghostjax rank run
        ghostjax rank run --set prose --domain wiki --count 5
        ghostjax rank run --by mean --csv > values.csv
        ghostjax rank run --json | jq -r '.[] | select(.verdict == "hurts") | .id'
        ghostjax rank run --set prose --mixture weights.json

    The value of an example sums, over its visits, the decrease of the validation loss by its share
    of the update. Positive helps. What follows the value is its standard error: how much it would
    vary with other validation rows. A step that was predicted to do much more than it did is named,
    and its scores count less.

    --csv and --json print one row per example and validation set, with all digits, best first:
    set, rank, id, domain, visits, value, error, mean (value per visit), mean_error, verdict and
    excerpt. Examples that were not visited come last and have neither rank nor value.
    Verdicts are helps, hurts and unclear, by a t test at 5%; few visits (fewer than 8, too few to
    tell); and not visited.

    --mixture writes {"domain": weight, ...}, with sum 1 and none 0: the share that each domain
    should have in the data of a next run, for the mean of the validation sets or that of --set. It
    is the share of the visits it had, times exp(rate * what the run would have taken off the
    validation loss with all visits in this domain), DoGE's rule. Levanter takes the file's content
    as train_weights; for Grain it is weights of MapDataset.mix, in the order of your data sets.

    Attributes:
      run: The run directory.
      set: The validation set to rank for. None: each of them.
      domain: Only the examples of this domain.
      count: How many examples of either end. None: 10; with --csv or --json, all examples.
      by: value: the sum over the visits; mean: the value per visit.
      csv: Print CSV.
      json: Print JSON.
      mixture: Also write mixture weights of the domains to this file, JSON; replaces it.
      mixture_rate: One over the unit of the loss: how much the values count in the mixture.
      quiet: Print the tables without notes.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    set: str | None = None
    domain: str | None = None
    count: int | None = None
    by: By = "value"
    csv: bool = False
    json: bool = False
    mixture: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    mixture_rate: float = 1.0
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        check_count(self.count)
        check_formats(self.csv, self.json)
        if self.mixture is not None and self.domain is not None:
            raise UsageError("--mixture is of all domains: leave out --domain")
        if not 0 < self.mixture_rate < math.inf:
            raise UsageError(f"--mixture-rate must be positive, got {self.mixture_rate}")


def run(config: RankConfig) -> None:
    """Prints the ranking.

    Raises:
      UsageError: an option, or the run directory, cannot be used.
      OSError: the mixture cannot be written.
    """
    config.check()
    source = read_run(config.run)
    check_choice("validation set", config.set, list(source.sets))
    values = whole = read_values(source)
    if config.set is not None:
        values = whole = {config.set: values[config.set]}
    if config.domain is not None:
        domains = sorted(set(source.examples["domain"].to_pylist()))
        check_choice("domain", config.domain, domains)
        values = {
            name: valued.select(valued.domains == config.domain) for name, valued in values.items()
        }
    if not any(valued.visited.any() for valued in values.values()):
        which = f" of domain {config.domain}" if config.domain is not None else ""
        raise UsageError(f"{config.run}: none of the examples{which} was visited so far")

    shares = None
    if config.mixture is not None:
        shares = domain_mixture(values, config.mixture_rate)
        # Without a digest, as data loaders take every name for a domain's.
        weights = json.dumps({share.name: share.weight for share in shares}, indent=2) + "\n"
        write_file(config.mixture, lambda file: file.write(weights.encode()))
    if config.csv:
        output.print_csv(_rows(values, config))
    elif config.json:
        output.print_json(list(_rows(values, config)))
    else:
        console = output.make_console(sys.stdout)
        for name, valued in values.items():
            print_values(
                console,
                f"validation set {name}",
                valued,
                by=config.by,
                count=config.count or DEFAULT_COUNT,
                domain=config.domain,
                quiet=config.quiet,
            )
        if shares is not None:
            print_mixture(console, shares)
        if not config.quiet:
            if not source.is_finished:
                output.print_text(console, output.progress_note(source))
            print_meaning(console, source)
            print_warnings(console, source, whole)


def _rows(values: dict[str, Valued], config: RankConfig) -> Iterator[dict[str, Any]]:
    for name, valued in values.items():
        ranked = valued.ranked(config.by)
        chosen = np.arange(len(ranked))
        unvisited = valued.select(~valued.visited)
        if config.count is not None:
            first, last = both_ends(ranked, config.count)
            chosen, unvisited = np.concatenate([first, last[::-1]]), unvisited.select(slice(0))
        for part, ranks in ((ranked, chosen), (unvisited, np.arange(len(unvisited)))):
            means, mean_errors = part.measured("mean")
            verdicts = part.verdicts
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
                    "verdict": verdicts[index],
                    "excerpt": part.excerpts[index],
                }
