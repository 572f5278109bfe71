"""``ghostjax report``: a run as one HTML page."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ghostjax.runs.commands.options import check_count
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report.output import plain
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import read_run

NAME = "report.html"


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Writes a run as one HTML page, report.html in the run directory, and prints its path.

    The page needs no network and can be sent to others: it has the distribution of values, values
    by domain and over training time, predicted against actual decrease of the loss, the share of
    each kind of layer, the losses, the best and worst examples with excerpts, a table of examples
    to search and sort, and in plain words how far the values can be trusted. Searching and sorting
    take its own script; all else is there without. Of a run that goes on, it shows what there is
    so far.

        ghostjax report run
        ghostjax report run --out pages/first.html
        xdg-open "$(ghostjax report run)"

    Replaces the page of an earlier call as a whole, and no other file.

    Attributes:
      run: The run directory.
      out: The file to write. None: report.html in the run directory.
      count: How many of the best and of the worst examples.
      quiet: Do not print the path.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    count: int = 10
    quiet: bool = False


def run(config: ReportConfig) -> None:
    """Writes the report.

    Raises:
      UsageError: an option, or the run directory, cannot be used.
      OSError: the report cannot be written; an earlier one is unchanged.
    """
    check_count(config.count)
    path = config.run / NAME if config.out is None else config.out
    if path.is_dir():
        raise UsageError(f"--out {path} is a directory: name a file in it, as {path / NAME}")
    if config.out is not None and not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no directory {path.parent}")
    text = make_report(read_run(config.run), config.count)
    write_file(path, lambda file: file.write(text.encode()))
    if not config.quiet:
        print(plain(str(path)))
