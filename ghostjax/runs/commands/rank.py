"""``ghostjax rank``: the training examples that helped most and those that hurt most."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from ghostjax.runs.analysis.mixture import domain_mixture
from ghostjax.runs.analysis.values import Valued, both_ends, read_values
from ghostjax.runs.analysis.visits import Visits, of_visits
from ghostjax.runs.commands.filters import Filter
from ghostjax.runs.commands.options import check_choice, check_count, check_formats
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import output
from ghostjax.runs.report.terminal import (
    print_meaning,
    print_mixture,
    print_values,
    print_visits,
    print_warnings,
)
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import Run, read_run

DEFAULT_COUNT = 10
# The columns of the log that visits have whatever the validation set, and where a log gets them.
OF_VISITS = {
    "loss": "losses of rows: give RunLog.add losses=",
    "norm": "norms of gradients: train with --norms, or give RunLog.add norms=",
}

RankBy = Literal["value", "mean", "loss", "norm"]


@dataclasses.dataclass(frozen=True)
class RankConfig(Filter):
    """Lists the training examples that helped most and those that hurt most.

    Reads a run directory and changes nothing in it. Of a run that goes on, it lists the values so
    far.

        ghostjax rank run
        ghostjax rank run --set prose --domain wiki --count 5
        ghostjax rank run --by mean --csv > values.csv
        ghostjax rank run --by loss --id "wiki:*" --text "import|def"
        ghostjax rank run --by norm --count 20
        ghostjax rank run --verdict hurts --min-visits 20
        ghostjax rank run --json | jq -r '.[] | select(.verdict == "hurts") | .id'
        ghostjax rank run --set prose --mixture weights.json

    The value of an example sums, over its visits, the decrease of the validation loss by its share
    of the update. Positive helps. What follows the value is its standard error: how much it would
    vary with other validation rows. A step that was predicted to do much more than it did is named,
    and its scores count less.

    --csv and --json print one row per example and validation set, with all digits, best first:
    set, rank, id, domain, visits, value, error, mean (value per visit), mean_error, verdict,
    excerpt, loss (the mean over the visits of the loss of the example's row before the update),
    first_loss, last_loss, and norm, first_norm and last_norm (of the gradient of that loss, where
    the run has them). Examples that were not visited come last and have neither rank nor
    value. Ranks and options count the examples that are chosen alone.
    Verdicts are helps, hurts and unclear, by a t test at 5%; few visits (fewer than 8, too few to
    tell); and not visited.

    --by loss lists the examples with the highest loss and those with the lowest, --by norm those
    with the largest and the smallest gradient: outliers, wrong labels and what the model has not
    learned are among the first. Norms are of the gradient of a row's own loss, not divided by the
    size of the batch, in the unit of the loss per unit of the parameters; a run has them that was
    trained with --norms. Where labels are wrong, it is the loss that shows it best.

    --mixture writes {"domain": weight, ...}, with sum 1 and none 0: the share that each domain
    should have in the data of a next run, for the mean of the validation sets or that of --set. It
    is the share of the visits it had, times exp(rate * what the run would have taken off the
    validation loss with all visits in this domain), DoGE's rule. Levanter takes the file's content
    as train_weights; for Grain it is weights of MapDataset.mix, in the order of your data sets.

    Attributes:
      set: The validation set to rank for. None: each of them.
      count: How many examples of either end. None: 10; with --csv or --json, all examples.
      by: value: the sum over the visits; mean: the value per visit; loss: the mean loss over the
        visits, scored or not; norm: the mean norm of the gradient over the visits that have one.
      csv: Print CSV.
      json: Print JSON.
      mixture: Also write mixture weights of the domains to this file, JSON; replaces it.
      mixture_rate: One over the unit of the loss: how much the values count in the mixture.
      quiet: Print the tables without notes.
    """

    set: str | None = None
    count: int | None = None
    by: RankBy = "value"
    csv: bool = False
    json: bool = False
    mixture: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    mixture_rate: float = 1.0
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        super().check()
        check_count(self.count)
        check_formats(self.csv, self.json)
        if self.mixture is not None and self.words:
            raise UsageError(f"--mixture is of all examples: leave out what asks for {self.words}")
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
    chosen = config.mask(next(iter(values.values())))
    values = {name: valued.select(chosen) for name, valued in values.items()}
    if not any(valued.visited.any() for valued in values.values()):
        which = f" of {config.words}" if config.words else ""
        raise UsageError(f"{config.run}: none of the examples{which} was visited so far")

    if config.by in OF_VISITS and not source.has("scores", config.by):
        way_out = OF_VISITS[config.by]
        raise UsageError(f"--by {config.by}: the log of {config.run} has no {way_out}")

    shares = None
    if config.mixture is not None:
        shares = domain_mixture(values, config.mixture_rate)
        # Without a digest, as data loaders take every name for a domain's.
        weights = json.dumps({share.name: share.weight for share in shares}, indent=2) + "\n"
        write_file(config.mixture, lambda file: file.write(weights.encode()))
    if config.csv:
        output.print_csv(_rows(source, values, config))
    elif config.json:
        output.print_json(_rows(source, values, config))
    else:
        console = output.make_console(sys.stdout)
        count = config.count or DEFAULT_COUNT
        if config.by in OF_VISITS:
            valued = next(iter(values.values()))
            ranked = _by_visits(source, valued, config.by)
            print_visits(console, config.by, *ranked, count, config.words)
            return
        for name, valued in values.items():
            print_values(
                console,
                f"validation set {name}",
                valued,
                by=config.by,
                count=count,
                chosen=config.words,
                quiet=config.quiet,
            )
        if shares is not None:
            print_mixture(console, shares)
        if not config.quiet:
            if not source.is_finished:
                output.print_text(console, output.progress_note(source))
            print_meaning(console, source)
            print_warnings(console, source, whole)


def _by_visits(source: Run, valued: Valued, column: str) -> tuple[Valued, Visits]:
    """The examples that have a loss or norm, the one with the highest first, and what they have."""
    found = _select(of_visits(source, column), valued.ids.places)
    order = np.argsort(-found.mean, kind="stable")  # NaN goes last
    order = order[np.isfinite(found.mean[order])]
    return valued.select(order), _select(found, order)


def _select(visits: Visits, which: np.ndarray) -> Visits:
    return Visits(*(each[which] for each in visits))


def _rows(source: Run, values: dict[str, Valued], config: RankConfig) -> Iterator[dict[str, Any]]:
    visits = {name: of_visits(source, name) for name in OF_VISITS}
    for name, valued in values.items():
        if config.by in OF_VISITS:
            ranked, _ = _by_visits(source, valued, config.by)
            is_left = np.ones(len(source.ids), bool)
            is_left[ranked.ids.places] = False
            rest = valued.select(is_left[valued.ids.places])
        else:
            ranked, rest = valued.ranked(config.by), valued.select(~valued.visited)
        ranks = np.arange(len(ranked))
        if config.count is not None:
            first, last = both_ends(ranked, config.count)
            ranks, rest = np.concatenate([first, last[::-1]]), rest.select(slice(0))
        yield from _of_part(name, ranked.select(ranks), ranks + 1, visits)
        yield from _of_part(name, rest, None, visits)


def _of_part(
    name: str, part: Valued, ranks: np.ndarray | None, visits: dict[str, Visits]
) -> Iterator[dict[str, Any]]:
    means, mean_errors = part.measured("mean")
    texts = zip(part.ids, part.domains, part.verdicts, part.excerpts, strict=True)
    for n, (one, domain, verdict, excerpt) in enumerate(texts):
        row = {
            "set": name,
            "rank": None if ranks is None else int(ranks[n]),
            "id": one,
            "domain": domain,
            "visits": part.visits[n],
            "value": part.values[n],
            "error": part.errors[n],
            "mean": means[n],
            "mean_error": mean_errors[n],
            "verdict": verdict,
            "excerpt": excerpt,
        }
        for column, own in visits.items():
            mean, first, last = (each[part.ids.places[n]] for each in own)
            row |= {column: mean, f"first_{column}": first, f"last_{column}": last}
        yield row
