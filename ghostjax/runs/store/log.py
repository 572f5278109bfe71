"""The log of a run, which only grows.

It grows by parts, one file per table and stretch of steps. A part is written before the checkpoint
of its last step, so after a crash the log is never behind the newest checkpoint, and going on from
that checkpoint means dropping the parts after it.

Of several processes each writes a file of its own rows, whose name tells its number and how many
there are; together these are one part, which is there when all of them are.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import schema
from ghostjax.runs.store.files import read_table, write_table

PARTS_AHEAD = 2


class Part(NamedTuple):
    """The steps first <= step < end of a table, in one file, or one of each process."""

    first: int
    end: int
    paths: tuple[Path, ...]


def find_parts(out: Path, table: str) -> list[Part]:
    """The parts of a table of the log, in order.

    Of two that begin at the same step, ``cut_log`` was killed before it removed the longer one.

    Raises:
      UsageError: steps between two of them are missing, or are there twice.
    """
    end, found = 0, []
    for part in _all_parts(out, table):
        if found and part.first == found[-1].first and part.end > end:
            continue
        if part.first > end:
            raise missing_steps(out, table, end, part.first)
        if part.first < end or part.end <= part.first:
            raise UsageError(f"{part.paths[0]} does not follow the part before it")
        found.append(part)
        end = part.end
    return found


def _all_parts(out: Path, table: str) -> list[Part]:
    """Those of a table that are there, the shorter of two with the same beginning first."""
    return _found(out, table)[0]


def _found(out: Path, table: str) -> tuple[list[Part], list[tuple[int, Path]]]:
    """The parts of a table; of those that not all processes have written, beginnings and files."""
    name = re.compile(rf"{table}-(\d+)-(\d+)(?:-(\d+)-of-(\d+))?\.parquet")
    groups: dict[tuple[int, ...], dict[int, Path]] = {}
    for path in (out / "log").glob("*.parquet"):
        if match := name.fullmatch(path.name):
            first, end, process, count = (int(text or 1) for text in match.groups())
            groups.setdefault((first, end, count), {})[process] = path
    parts, incomplete = [], []
    for (first, end, count), paths in sorted(groups.items()):
        if sorted(paths) == list(range(1, count + 1)):
            parts.append(Part(first, end, tuple(paths[n] for n in sorted(paths))))
        else:
            incomplete += [(first, path) for path in paths.values()]
    return parts, incomplete


def cut_log(out: Path, sets: Sequence[str], step: int) -> None:
    """Drops the steps from ``step`` on, so that a loop can make them again.

    Killed at any time, it leaves a log that can be read and cut again.

    Raises:
      UsageError: a part that has steps on both sides cannot be read.
    """
    for table in schema.LOG_TABLES:
        kept = [part for part in find_parts(out, table) if part.end <= step]
        parts, incomplete = _found(out, table)
        for _, path in incomplete:
            path.unlink()
        # From the end, so that being killed here leaves no gap.
        for part in reversed([each for each in parts if each not in kept]):
            if part.first < step < part.end:
                rows = read_part(part, table, sets)
                rows = rows.slice(0, np.searchsorted(rows["step"].to_numpy(), step))
                name = schema.part_name(table, part.first, step)
                write_table(out / "log" / name, rows)
            for path in part.paths:
                path.unlink()


def read_part(
    part: Part, table: str, sets: Sequence[str], columns: Collection[str] | None = None
) -> pa.Table:
    """The rows of a part, in all columns or in some, the steps among them.

    Raises:
      UsageError: it cannot be read, as ``read_table`` says, or has other steps than its name says.
    """
    rows = pa.concat_tables([read_table(path, table, sets, columns) for path in part.paths])
    if len(part.paths) > 1:  # a step's rows in the order of the processes, as in its batch
        rows = rows.take(np.argsort(rows["step"].to_numpy(), kind="stable"))
    try:
        check_steps(table, rows, part.first, part.end)
    except ValueError as error:
        raise UsageError(f"{part.paths[0]}: {error}") from error
    return rows


def missing_steps(out: Path, table: str, first: int, end: int) -> UsageError:
    """
    >>> missing_steps(Path("run"), "scores", 64, 128)
    UsageError('run/log/scores: steps 64 to 127 are missing')
    """
    return UsageError(f"{out / 'log' / table}: steps {first} to {end - 1} are missing")


class LogWriter:
    """Writes the tables of the log part by part.

    Every part is complete or absent. The parts of the tables for the same steps are written one
    after the other: after a crash, some tables may have one more than others.

    Args:
      out: The run directory.
      sets: Names of the validation sets.
      process, processes: Which of how many this is. The first writes all tables, the others their
        rows of ``scores`` alone.

    Attributes:
      dropped: How many steps of the log ``resume`` dropped, as they had no checkpoint.
    """

    def __init__(self, out: Path, sets: Sequence[str], process: int = 0, processes: int = 1):
        self._folder, self._sets = out / "log", tuple(sets)
        self._process, self._processes = process, processes
        tables = ("scores",) if process else schema.LOG_TABLES
        self._schemas = {table: schema.table_schema(table, sets) for table in tables}
        self._rows: dict[str, list[pa.RecordBatch]] = {table: [] for table in tables}
        self._first = 0
        self.dropped = 0

    @classmethod
    def resume(
        cls, out: Path, sets: Sequence[str], step: int, process: int = 0, processes: int = 1
    ) -> "LogWriter":
        """A writer that goes on at ``step``, the step of a checkpoint.

        Of several processes the first does what follows, and the others must wait for it.

        Drops what an interrupted run wrote from ``step`` on and the files it left half-written;
        ``dropped`` says how many steps that were. A run writes one part ahead of its checkpoint at
        most, and two where a damaged checkpoint was deleted to go on from the one before it.

        Raises:
          UsageError: the steps before ``step`` are not all there, a part of them cannot be read or
            was changed, a part has steps on both sides, or more than these parts would be dropped;
            nothing was changed.
        """
        writer = cls(out, sets, process, processes)
        writer._first = step
        if process:
            return writer
        stale, ahead = [], set()
        for table in schema.LOG_TABLES:
            parts = find_parts(out, table)
            kept = [part for part in parts if part.first < step]
            end = kept[-1].end if kept else 0
            if end < step:
                raise missing_steps(out, table, end, step)
            if end > step:
                raise UsageError(f"{kept[-1].paths[0]} goes beyond step {step} of the checkpoint")
            for part in kept:
                read_part(part, table, sets)
            ahead |= {part.end for part in parts[len(kept) :]}
            # From the end, so that being killed here leaves no gap.
            stale += [path for part in reversed(parts[len(kept) :]) for path in part.paths]
            stale += [path for first, path in _found(out, table)[1] if first >= step]
        if len(ahead) > (PARTS_AHEAD if step else 1):
            raise UsageError(
                f"{out} has steps {step} to {max(ahead) - 1} in its log but no checkpoint of them: "
                f"put {out / 'checkpoints'} back; or, to make these steps again, delete the files "
                f"of {out / 'log'} from step {step} on"
            )
        for folder in (out, out / "log"):
            stale += folder.glob(".*.partial")
        for path in stale:
            path.unlink(missing_ok=True)
        writer.dropped = max(ahead, default=step) - step
        return writer

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Keeps rows of a table until ``flush``.

        Args:
          table: One of ``LOG_TABLES``.
          columns: An array, or a scalar that holds for all of the rows, for every column of the
            table. Without arrays it is one row. None, or NaN, stands for a value that is not there
            where the column allows that. What is there per validation set can be given as one
            array [K, ...], by the column's name without that of the set.

        Raises:
          ValueError, TypeError: a column is missing, unknown, of another type or length, or None
            where that is not allowed. The message names the table and the column.
        """
        fields = self._schemas[table]
        columns = schema.by_set(table, columns, self._sets)
        missing = [name for name in fields.names if name not in columns]
        surplus = [name for name in columns if name not in fields.names]
        for problem, names in (("missing", missing), ("unknown", surplus)):
            if names:
                raise ValueError(f"log/{table}: {problem} columns {', '.join(names)}.")
        arrays = {f.name: _checked(f"log/{table}", f, columns[f.name]) for f in fields}
        lengths = {name: len(array) for name, array in arrays.items() if array.ndim == 1}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"log/{table}: columns of different lengths: {lengths}.")
        rows = next(iter(lengths.values()), 1)
        values = [
            # from_pandas: NaN is null.
            pa.array(
                np.broadcast_to(arrays[field.name], rows), field.type, from_pandas=field.nullable
            )
            for field in fields
        ]
        self._rows[table].append(pa.record_batch(values, schema=fields))

    def flush(self, end: int) -> None:
        """Writes the part of each table for the steps up to ``end``, without it.

        When this returns, they are on disk. Without new steps, nothing is written.

        Raises:
          ValueError: the steps appended since the last part are not those from its end to ``end``.
          OSError: something cannot be written; ``flush`` can be called again.
        """
        tables = {
            table: pa.Table.from_batches(self._rows[table], self._schemas[table])
            for table in self._rows
        }
        for table, rows in tables.items():
            check_steps(table, rows, self._first, end)
        if end == self._first:
            return
        self._folder.mkdir(exist_ok=True)
        for table, rows in tables.items():
            own = (self._process, self._processes) if table == "scores" else (0, 1)
            write_table(self._folder / schema.part_name(table, self._first, end, *own), rows)
        self._rows = {table: [] for table in self._rows}
        self._first = end


def check_steps(table: str, rows: pa.Table, first: int, end: int) -> None:
    """Raises ``ValueError`` unless the rows are those of the steps first <= step < end, in order.

    The table ``steps`` has one row for every step, the others any number.
    """
    steps = rows["step"].to_numpy()
    if table == "steps":
        fits = np.array_equal(steps, np.arange(first, end))
    else:
        in_order = (np.diff(np.concatenate([[first], steps, [end - 1]])) >= 0).all()
        fits = in_order or (first == end and not len(steps))
    if not fits:
        raise ValueError(f"log/{table}: expected the steps from {first} to {end - 1}, in order.")


def _checked(where: str, field: pa.Field, value: Any) -> np.ndarray:
    """The value as an array of the field's type, of rank 0 or 1."""
    if value is None:
        array = np.array(None, object)
    elif pa.types.is_string(field.type):
        array = np.asarray(value, object)
    else:
        array = np.asarray(value)
        wanted = field.type.to_pandas_dtype()
        # Not from integers to floats or back: such a column is another one than it should be.
        numbers = "iu" if pa.types.is_integer(field.type) else "fV"  # V: bfloat16
        if array.dtype.kind not in numbers or not np.can_cast(array.dtype, wanted, "same_kind"):
            raise TypeError(
                f"{where}: column {field.name} must be {field.type}, got {array.dtype}."
            )
        array = array.astype(wanted)
    if array.ndim > 1:
        raise ValueError(f"{where}: column {field.name} has shape {list(array.shape)}.")
    if array.dtype.hasobject:
        if not field.nullable and any(item is None for item in array.flat):
            raise ValueError(f"{where}: column {field.name} must not be None.")
        if not all(isinstance(item, str | None) for item in array.flat):
            raise TypeError(f"{where}: column {field.name} must be {field.type}.")
    return array
