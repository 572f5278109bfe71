"""Files of texts: read through in order, and any record by where it is afterwards."""

import collections
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.errors import UsageError

RECENT_BYTES = 2**26  # of row groups, and of tokens
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Fields(NamedTuple):
    """Which fields of a record have its text, id and domain. None: those of the file's name."""

    text: str = "text"
    id: str | None = None
    domain: str | None = None


class Record(NamedTuple):
    """What a file says of a document.

    Attributes:
      at: where ``Shard.read`` finds it.
      number: of its line or row, for people.
      fields: what is there.
    """

    at: int
    number: int
    fields: dict[str, Any]


class Recent:
    """Values that were made before, the latest of them in ``RECENT_BYTES``, but one at least."""

    def __init__(self) -> None:
        self._values: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._bytes = 0

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of ``key``, which has ``nbytes``; made where it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        self._bytes += _cost(value)
        while self._bytes > RECENT_BYTES and len(self._values) > 1:
            self._bytes -= _cost(self._values.popitem(last=False)[1])
        return value


def _cost(value: Any) -> int:
    return value.nbytes + 2**9  # what Python needs for it


class Shard:
    """A file, which must stay as it was when it was opened first.

    Attributes:
      path: the file's.
      unit: what its records are, for people.
    """

    unit = "line"

    def __init__(self, path: Path, fields: Fields, recent: Recent):
        self.path, self._fields, self._recent = path, fields, recent
        self._state: tuple[int, int] | None = None

    def scan(self) -> Iterator[Record]:
        """All records in order.

        Raises:
          UsageError: the file, or a record, cannot be read, or the file changed.
        """
        with self._open() as file:
            yield from self._scan(file)
            self._check(file)

    def read(self, at: int) -> dict[str, Any]:
        """The fields of the record that ``scan`` found there; raises as ``scan``."""
        with self._open() as file:
            return self._read(file, at)

    def place(self, number: int) -> str:
        """Where a record is, for people."""
        return f"{self.path}, {self.unit} {number}"

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            with self.path.open("rb") as file:
                self._check(file)
                yield file
        except OSError as error:
            way_out = "" if self._state is None else "; it was read before: put it back as it was"
            raise UsageError(f"{self.path}: {error.strerror or error}{way_out}") from error

    def _check(self, file: IO[bytes]) -> None:
        found = os.fstat(file.fileno())
        state = found.st_size, found.st_mtime_ns
        if self._state not in (None, state):
            raise UsageError(f"{self.path} changed while it was used: put it back as it was")
        self._state = state

    def _scan(self, file: IO[bytes]) -> Iterator[Record]:
        raise NotImplementedError

    def _read(self, file: IO[bytes], at: int) -> dict[str, Any]:
        raise NotImplementedError

    def _lines(self, file: IO[bytes], start: int = 0) -> Iterator[tuple[int, int, str]]:
        """Offsets, numbers from 1 and texts of lines. They end with a line feed, carriage return or
        both; a form feed or a Unicode line separator ends none."""
        offset, numbers = start, itertools.count(1)
        file.seek(start)
        for raw in file:
            if not offset and raw.startswith(_BYTE_ORDER_MARK):
                offset, raw = len(_BYTE_ORDER_MARK), raw[len(_BYTE_ORDER_MARK) :]
            end, line = offset + len(raw), raw.removesuffix(b"\n").removesuffix(b"\r")
            for part in line.split(b"\r"):
                try:
                    yield offset, next(numbers), part.decode()
                except UnicodeDecodeError as error:
                    where = offset + error.start
                    raise UsageError(f"{self.path}: not UTF-8 text (byte {where})") from error
                offset += len(part) + 1
            offset = end


class Blocks(Shard):
    """The blocks of lines between blank ones."""

    def _scan(self, file: IO[bytes]) -> Iterator[Record]:
        if self._fields.id is not None or self._fields.domain is not None:
            option = "--domain-field" if self._fields.id is None else "--id-field"
            raise UsageError(
                f"{self.path}: {option} is for .jsonl and .parquet, a .txt has no fields"
            )
        for is_text, group in itertools.groupby(self._lines(file), _has_text):
            if is_text:
                at, number, first = next(group)
                lines = [first, *(text for _, _, text in group)]
                yield Record(at, number, {self._fields.text: "\n".join(lines)})

    def _read(self, file: IO[bytes], at: int) -> dict[str, Any]:
        lines = itertools.takewhile(_has_text, self._lines(file, at))
        return {self._fields.text: "\n".join(text for _, _, text in lines)}


def _has_text(line: tuple[int, int, str]) -> bool:
    return bool(line[2].strip())


class Lines(Shard):
    """The objects of JSON lines; which fields they have is up to each."""

    def _scan(self, file: IO[bytes]) -> Iterator[Record]:
        for at, number, line in self._lines(file):
            if line.strip():
                yield Record(at, number, self._parsed(line, f"line {number}"))

    def _read(self, file: IO[bytes], at: int) -> dict[str, Any]:
        return self._parsed(next(self._lines(file, at))[2], f"byte {at}")

    def _parsed(self, line: str, where: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"{self.path}, {where}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise UsageError(f"{self.path}, {where}: expected a JSON object, found {found}")
        return record


class Rows(Shard):
    """The rows of a Parquet file, in the columns that are asked for. Of a single one, its whole row
    group is read; the latest of these are kept."""

    unit = "row"

    def _scan(self, file: IO[bytes]) -> Iterator[Record]:
        with self._source(file) as (source, names):
            number = 0
            for batch in source.iter_batches(2**10, columns=names):
                for row in batch.to_pylist() if names else [{}] * len(batch):
                    yield Record(number, number, row)
                    number += 1

    def _read(self, file: IO[bytes], at: int) -> dict[str, Any]:
        def ends() -> np.ndarray:
            with self._source(file) as (source, _):
                count = source.metadata.num_row_groups
                return np.cumsum([source.metadata.row_group(n).num_rows for n in range(count)])

        def rows() -> pa.Table:
            with self._source(file) as (source, names):
                return source.read_row_group(group, columns=names)

        edges = self._recent((self.path, "ends"), ends)
        group = int(np.searchsorted(edges, at, side="right"))
        table = self._recent((self.path, group), rows)
        return table.slice(at - int(edges[group]) + len(table), 1).to_pylist()[0]

    @contextlib.contextmanager
    def _source(self, file: IO[bytes]) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
        try:
            # The buffer, so that no column of a row group is read at once to go through its rows.
            with pq.ParquetFile(file, buffer_size=2**20) as source:
                known = set(source.schema_arrow.names)
                yield source, [name for name in dict.fromkeys(self._fields) if name in known]
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{self.path}: not a Parquet file ({reason})") from error


_KINDS = {".txt": Blocks, ".jsonl": Lines, ".parquet": Rows}


def open_shard(path: Path, fields: Fields, recent: Recent) -> Shard:
    """Raises ``UsageError`` for a file of another kind."""
    if path.suffix not in _KINDS:
        if path.is_dir():
            raise UsageError(
                f'{path} is a directory: give its files, or a pattern of them, as "{path}/*.jsonl"'
            )
        raise UsageError(
            f"{path}: expected a .txt, .jsonl or .parquet file; for others, such as ArrayRecord, "
            "give --task a function that returns a ghostjax.Task with a PyGrain source"
        )
    return _KINDS[path.suffix](path, fields, recent)
