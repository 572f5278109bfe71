"""``ghostjax tensorboard``: a run as scalars that TensorBoard shows."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro

from ghostjax.runs.analysis.curves import Curve, curves
from ghostjax.runs.commands.options import check_count
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report.output import plain
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import read_run

FOLDER = "tensorboard"
NAME = "events.out.tfevents.ghostjax"  # TensorBoard reads files with tfevents in their name


@dataclasses.dataclass(frozen=True)
class TensorboardConfig:
    """Writes a run as scalars for TensorBoard, an event file in a directory, and prints its path.

        ghostjax tensorboard run
        ghostjax tensorboard run --out tb/first --count 3
        tensorboard --logdir run

    Over the steps: losses of training and validation; predicted and actual decrease of the
    validation loss; learning rate, certificate, audits, and norms of gradients where the log has
    them; scores by kind of layer; and what values have come to, in all, by domain (up to 20) and of
    the examples that helped and hurt most. In names, what is no letter, digit or -_./ becomes _.

    Another call replaces the file as a whole, and no other file. It needs tensorboardX: pip install
    "ghostjax[tensorboard]".

    Attributes:
      run: The run directory.
      out: The directory of the file. None: tensorboard in the run directory.
      count: How many of the best and of the worst examples.
      quiet: Do not print the path.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    count: int = 5
    quiet: bool = False


def run(config: TensorboardConfig) -> None:
    """Writes the event file.

    Raises:
      UsageError: an option, or the run directory, cannot be used, or tensorboardX is missing.
      OSError: the file cannot be written; an earlier one is unchanged.
    """
    check_count(config.count)
    folder = config.run / FOLDER if config.out is None else config.out
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is not a directory")
    source = read_run(config.run)
    with tempfile.TemporaryDirectory() as aside:
        events = Path(aside) / NAME
        _write_events(events, curves(source, config.count))
        folder.mkdir(parents=True, exist_ok=True)
        with events.open("rb") as made:
            write_file(folder / NAME, lambda file: shutil.copyfileobj(made, file))
    if not config.quiet:
        print(plain(str(folder / NAME)))


def _write_events(path: Path, found: Iterable[Curve]) -> None:
    """In the order of the curves. The log has no times, so all events have that of the export."""
    try:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise UsageError(
            f'ghostjax tensorboard needs {name}: pip install "ghostjax[tensorboard]"'
        ) from error
    now = time.time()
    # Not SummaryWriter, whose thread keeps the errors of a full disk to itself.
    writer = RecordWriter(str(path))
    try:
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for name, steps, numbers in found:
            for step, number in zip(steps.tolist(), numbers.tolist()):
                event = Event(wall_time=now, step=step, summary=scalar(name, number))
                writer.write(event.SerializeToString())
    finally:
        writer.close()
