"""``ghostjax report``: a run as one HTML page."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ghostjax.runs.commands.options import check_count
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report.output import plain
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import Run, read_run

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

    Of a text that is longer than a window, the page shows the window that counted most for its
    value. For that it reads the files that the run was started with; where they are not there, or
    with --no-windows, it shows how the text begins.

    Replaces the page of an earlier call as a whole, and no other file.

    Attributes:
      run: The run directory.
      out: The file to write. None: report.html in the run directory.
      count: How many of the best and of the worst examples.
      windows: Read the data again, for the texts of windows.
      quiet: Do not print the path.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    count: int = 10
    windows: bool = True
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
    source = read_run(config.run)
    task, note = _texts(source) if config.windows else (None, None)
    text = make_report(source, config.count, task, note)
    write_file(path, lambda file: file.write(text.encode()))
    if not config.quiet:
        print(plain(str(path)))


def _texts(source: Run) -> tuple[TextTask | None, str | None]:
    """The data of a run on texts, or why they are not there."""
    if source.metadata.get("task") != TextTask.name:
        return None, None
    try:
        return read_task(source)[1], None
    except UsageError as error:
        return None, f"Texts are shown from their beginning, not in windows: {error}."
