"""``ghostjax export``: a cleaned or re-weighted subset of the training examples, as a file."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from ghostjax import selection
from ghostjax.runs.analysis.duplicates import duplicates
from ghostjax.runs.analysis.values import By, Valued, Verdict, read_values
from ghostjax.runs.commands.filters import Filter
from ghostjax.runs.commands.options import check_choice, check_similarity
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import output
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import read_run

SUFFIXES = (".jsonl", ".parquet")
_BLOCK = 2**10  # examples that are written at once


@dataclasses.dataclass(frozen=True)
class ExportConfig(Filter):
    """Writes a cleaned or re-weighted subset of the training examples to a file.

        ghostjax export run --out kept.jsonl --drop hurts
        ghostjax export run --out best.parquet --set prose --top 0.5
        ghostjax export run --out weights.parquet --set prose --weights softmax --temperature 2
        ghostjax export run --out clean.jsonl --drop hurts --unique 0.8 --documents

    The file has a line of JSON (.jsonl) or a row (.parquet) for each example that is kept, in the
    order of the training data: id, domain, visits, weight, value, error and verdict; with
    --documents, also its text. With --text-field text --id-field id --domain-field domain, ghostjax
    train takes such a file as it is.

    The options that choose examples come first, then --drop, --unique, --top and --weights. Weights
    have mean 1 over the file, so that learning rates need no change. An example that was not
    visited has no value: --top and softmax leave it out.

    The file is there as a whole or not at all.

    Attributes:
      out: The file to write, .jsonl or .parquet.
      set: The validation set whose values decide. None: the only one there is.
      drop: Leave out the examples of this verdict, or of these.
      unique: Of examples that are alike by this much, from 0.6 to 1, keep the one with the highest
        value: one of each group that ghostjax duplicates --similarity lists. It needs the files
        that the run was started with.
      top: Keep the examples with the highest values: a fraction, below 1 or written with a point,
        of the examples that are left and have a value, or their number.
      by: What --unique, --top and --weights go by. value: the sum over the visits; mean: the value
        per visit.
      weights: equal: 1 for all; softmax: they grow with the value, as selection.softmax has it.
      temperature: Of softmax, in standard deviations of the values. Large: all weights alike.
      documents: Also write the texts. It needs the files that the run was started with.
      force: Replace a file that is there.
      quiet: Do not tell what was written.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path()
    set: str | None = None
    drop: tuple[Verdict, ...] = ()
    unique: Annotated[float | None, tyro.conf.arg(metavar="SIMILARITY")] = None
    top: Annotated[str | None, tyro.conf.arg(metavar="FRACTION|K")] = None
    by: By = "value"
    weights: Literal["equal", "softmax"] = "equal"
    temperature: float = 1.0
    documents: bool = False
    force: bool = False
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        super().check()
        if self.out == Path():
            raise UsageError("--out: give the file to write, .jsonl or .parquet")
        if self.out.suffix not in SUFFIXES:
            raise UsageError(f"--out {self.out}: expected a .jsonl or .parquet file")
        if not self.temperature > 0:
            raise UsageError(f"--temperature must be positive, got {self.temperature}")
        if self.unique is not None:
            check_similarity("unique", self.unique)
        if self.top is not None:
            count_of(self.top, 1)
        if not self.force and self.out.exists():
            raise UsageError(f"{self.out} is there already: --force replaces it")


def count_of(top: str, count: int) -> int:
    """How many of ``count`` examples ``--top`` keeps.

    >>> count_of("0.5", 9), count_of("20", 9), count_of("1.0", 9)
    (5, 9, 9)

    Raises:
      UsageError: it is neither a fraction from 0 to 1 nor a number from 1 up.
    """
    try:
        if top.isdecimal() and int(top) >= 1:
            return min(int(top), count)
        fraction = float(top)
        if not top.isdecimal() and 0 < fraction <= 1:
            return int(np.ceil(fraction * count))
    except ValueError:
        pass
    raise UsageError(
        f"--top {top}: expected a fraction above 0 and up to 1, written with a point, or a number "
        "of examples from 1 up"
    )


def run(config: ExportConfig) -> None:
    """Writes the file.

    Raises:
      UsageError: an option, the run directory or its data cannot be used, or nothing is left.
      OSError: the file cannot be written; one that was there is unchanged.
    """
    config.check()
    source = read_run(config.run)
    check_choice("validation set", config.set, list(source.sets))
    if config.set is None and len(source.sets) > 1:
        raise UsageError(f"--set: give one of {', '.join(source.sets)}, whose values decide")
    valued = read_values(source)[config.set or source.sets[0]]
    needs_data = config.documents or config.unique is not None
    task = read_task(source)[1] if needs_data else None
    if config.documents and not isinstance(task, TextTask):
        raise UsageError(f"--documents: {source.path} is no run on texts")
    kept, copies = choose(valued, config, task)
    weights = np.ones(len(kept), np.float32)
    if config.weights == "softmax":
        scores = np.float32(valued.measured(config.by)[0][kept])
        weights = np.asarray(selection.softmax(scores, config.temperature))
    _write(config.out, _tables(valued, kept, weights, task if config.documents else None))
    if not config.quiet:
        console = output.make_console(sys.stdout)
        line = f"{config.out}: {len(kept)} of {len(valued)} examples"
        without = f", without {copies} near-duplicate{'s' * (copies > 1)}" if copies else ""
        output.print_text(console, line + without)


def choose(valued: Valued, config: ExportConfig, task: LoadedTask | None) -> tuple[np.ndarray, int]:
    """Indices of the examples that are kept, ascending; how many ``--unique`` left out.

    Raises:
      UsageError: none is.
    """
    is_kept = config.mask(valued) & ~np.logical_or.reduce(
        [valued.verdicts == one for one in config.drop], initial=False
    )
    needs_value = config.top is not None or config.weights == "softmax"
    if needs_value:
        is_kept &= np.isfinite(valued.values)
    copies = _copies(valued, config, task, np.flatnonzero(is_kept))
    is_kept[copies] = False
    kept = np.flatnonzero(is_kept)
    if not len(kept):
        raise UsageError(f"{config.run}: none of {len(valued)} examples is left to be written")
    if config.top is None:
        return kept, len(copies)
    measured = valued.measured(config.by)[0][kept]
    best = selection.top_k(np.float32(measured), count_of(config.top, len(kept)))
    return kept[np.asarray(best) > 0], len(copies)


def _copies(
    valued: Valued, config: ExportConfig, task: LoadedTask | None, chosen: np.ndarray
) -> np.ndarray:
    """Of the chosen examples, indices of those that have a better one that is alike.

    Of a group, the one that stays has the highest value; one without a value comes after all others
    and of the same value the first stays.
    """
    if config.unique is None:
        return np.zeros(0, int)
    groups = duplicates(len(chosen), lambda n: task.elements(chosen[n]), config.unique)
    values = np.where(valued.visited, valued.measured(config.by)[0], -np.inf)
    members = [chosen[group] for group in groups]
    return np.concatenate(
        [np.zeros(0, int), *(np.delete(own, values[own].argmax()) for own in members)]
    )


def _tables(
    valued: Valued, kept: np.ndarray, weights: np.ndarray, task: TextTask | None
) -> Iterator[pa.Table]:
    """What is written, some examples at a time."""
    for start in range(0, len(kept), _BLOCK):
        places = kept[start : start + _BLOCK]
        rows = valued.select(places)
        columns = {
            "id": pa.array(rows.ids, pa.string()),
            "domain": pa.array(rows.domains, pa.string()),
            "visits": pa.array(rows.visits, pa.int64()),
            "weight": pa.array(weights[start : start + _BLOCK], pa.float32()),
            # from_pandas: NaN is null.
            "value": pa.array(rows.values, pa.float64(), from_pandas=True),
            "error": pa.array(rows.errors, pa.float64(), from_pandas=True),
            "verdict": pa.array(rows.verdicts, pa.string()),
        }
        if task is not None:
            columns["text"] = pa.array(map(task.text, places), pa.string())
        yield pa.table(columns)


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    def write(file: IO[bytes]) -> None:
        if path.suffix == ".parquet":
            first = next(tables)
            with pq.ParquetWriter(file, first.schema) as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(table)
            return
        for table in tables:
            for row in table.to_pylist():
                line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                file.write(line.encode())

    write_file(path, write)
