"""Reading a run directory, whether the run is over, going on or was cut off."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ghostjax.runs.errors import UsageError
from ghostjax.runs.mapped import mapped, mapped_texts
from ghostjax.runs.store.files import ROW_GROUP, read_column, read_json, read_table
from ghostjax.runs.store.log import find_parts, missing_steps, read_part
from ghostjax.runs.store.schema import LOG_TABLES, SCHEMA_VERSION, SET_NAME, newer, table_schema

SMALL = 2**22  # bytes of a table's files
_PARTS = 16  # of very many ids, which are looked up in one after another


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory. Tables are read when they are first asked for, and kept. What is about every
    example or visit is better read in columns, or in parts: then little more than what is asked for
    is in memory, however long the run is.

    Reading a table raises ``UsageError``, one line that names the file, where it is missing,
    cannot be read, was changed since it was written, has other columns than
    ``schema.table_schema``, or other steps than its name says.

    Attributes:
      path: The directory.
      metadata: What ``run.json`` holds.
      sets: Names of the validation sets, from ``metadata["sets"]``.
      summary: What ``summary.json`` holds; None while the run is not over.
      end: How many steps the log holds, the same for all of its tables. Of a run that was cut off
        between its tables, those that all of them hold.
    """

    path: Path
    metadata: dict[str, Any]
    sets: tuple[str, ...]
    summary: dict[str, Any] | None
    end: int

    @functools.cached_property
    def examples(self) -> pa.Table:
        """The training examples."""
        return read_table(self.path / "examples.parquet", "examples", self.sets)

    @functools.cached_property
    def scores(self) -> pa.Table:
        """The log's table of visits, all parts in order."""
        return self._log("scores")

    @functools.cached_property
    def steps(self) -> pa.Table:
        """The log's table of steps, all parts in order."""
        return self._log("steps")

    @functools.cached_property
    def kinds(self) -> pa.Table:
        """The log's table of kinds of layers, all parts in order."""
        return self._log("kinds")

    @functools.cached_property
    def ids(self) -> pa.Array:
        """Of the examples, each once."""
        found = self._column("id")
        if is_twice(found):
            raise UsageError(f"{self.path / 'examples.parquet'}: an id is there twice")
        return found

    @functools.cached_property
    def domains(self) -> pa.Array:
        """Of the examples."""
        return self._column("domain")

    def excerpts(self, places: np.ndarray) -> pa.Array:
        """Of some examples: those of a few are read with what is near them in the file alone."""
        path = self.path / "examples.parquet"
        _ = self.ids  # for which the whole file was checked
        with pq.ParquetFile(path) as source:
            groups = [source.metadata.row_group(n) for n in range(source.num_row_groups)]
            ends = np.cumsum([group.num_rows for group in groups])
            wanted = np.unique(np.searchsorted(ends, places, side="right"))
            rows = source.read_row_groups(wanted.tolist(), ["excerpt"])["excerpt"]
        sizes = np.array([groups[n].num_rows for n in wanted], np.int64)
        firsts = np.zeros(len(groups), np.int64)  # of a group, its place in the file minus in rows
        firsts[wanted] = ends[wanted] - np.cumsum(sizes)
        return _array(rows.take(places - firsts[np.searchsorted(ends, places, side="right")]))

    def visits(self, *columns: str) -> Iterator[dict[str, np.ndarray]]:
        """The log's visits in order, many at a time: of each its ``step``, ``place``, the example
        that it is of, and ``columns`` as float64, NaN where there is no value.

        Raises:
          UsageError: an id is there twice, or the log has one that is not one of an example.
        """
        for rows in self._parts("scores", ("step", "id", *columns), len(self.ids) // _PARTS):
            ids = _array(rows["id"])
            places = find(ids, self.ids)
            if (places < 0).any():
                unknown = ids[int(np.argmin(places))].as_py()
                raise UsageError(
                    f"{self.path}: the log has id {unknown!r}, which is not in examples.parquet"
                )
            found = {name: _numbers(rows[name]) for name in columns}
            yield {"step": rows["step"].to_numpy(), "place": places, **found}

    @functools.cached_property
    def scored(self) -> np.ndarray:
        """Which steps were scored, [steps] bool."""
        found, column = np.zeros(self.end, bool), f"score_{self.sets[0]}"
        for rows in self._parts("scores", ("step", column)):
            found[rows["step"].to_numpy()[np.isfinite(_numbers(rows[column]))]] = True
        return found

    def has(self, table: str, column: str) -> bool:
        """Whether a column of the log has a number anywhere."""
        parts = self._parts(table, ("step", column))
        return any(np.isfinite(_numbers(rows[column])).any() for rows in parts)

    @property
    def is_finished(self) -> bool:
        """Whether the run is over, so that its values are final."""
        return self.summary is not None and self.summary.get("finished", True) is not False

    @property
    def unit(self) -> str:
        """The unit of the loss, and so of the values, in words."""
        found = self.metadata.get("unit")
        return found if isinstance(found, str) and found else "the unit of the loss"

    def numbers(self, table: str, column: str) -> np.ndarray:
        """A column of the log as float64, NaN where there is no value."""
        return _numbers(getattr(self, table)[column])

    def begun(self) -> dict[str, Any]:
        """``metadata`` that has the id of the run, and the options and fingerprints it began with.

        Raises:
          UsageError: it has not.
        """
        needed = ("id", "options", "fingerprints")
        missing = [name for name in needed if name not in self.metadata]
        if missing:
            raise UsageError(f"{self.path / 'run.json'}: no {' and '.join(missing)} in it")
        return self.metadata

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the run from others, and so its checkpoints from theirs.

        Raises:
          UsageError: the metadata lack it.
        """
        begun = self.begun()
        return {"run": begun["id"], **begun["fingerprints"]}

    def _log(self, table: str) -> pa.Table:
        rows = [table_schema(table, self.sets).empty_table()]
        for part in find_parts(self.path, table):
            if part.first < self.end:
                rows.append(self._within(read_part(part, table, self.sets)))
        return pa.concat_tables(rows)

    def _within(self, rows: pa.Table) -> pa.Table:
        return rows.slice(0, np.searchsorted(rows["step"].to_numpy(), self.end))

    def _parts(self, table: str, columns: Sequence[str], least: int = 0) -> Iterator[pa.Table]:
        """The log in so many rows at a time or more; a small one is kept, as by its property."""
        parts = [part for part in find_parts(self.path, table) if part.first < self.end]
        size = sum(path.stat().st_size for part in parts for path in part.paths)
        if table in self.__dict__ or size <= SMALL:
            yield getattr(self, table).select(columns)
            return
        held: list[pa.Table] = []
        for part in parts:
            held.append(self._within(read_part(part, table, self.sets, columns)))
            if part is parts[-1] or sum(map(len, held)) >= max(least, ROW_GROUP):
                yield pa.concat_tables(held)
                held = []

    def _column(self, name: str) -> pa.Array:
        if "examples" in self.__dict__:
            return _array(self.examples[name])
        path = self.path / "examples.parquet"
        return mapped_texts(read_column(path, "examples", self.sets, name))


def read_run(path: Path) -> Run:
    """The run directory ``path``, of which a table is read when it is asked for.

    Of a run that goes on or was cut off, it is what all tables of the log hold at this moment.

    Raises:
      UsageError: one line, where there is no such directory, it is not one of a run or one of a
        newer ghostjax, or a part of the log is missing: between other parts, or at the end of a
        run that is over.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise UsageError(f"{path} {problem}")
    metadata = read_json(path / "run.json")
    if metadata is None:
        raise UsageError(f"{path} is not a run directory: it has no run.json")
    version = metadata.get("schema_version")
    if type(version) is not int or version < 1:
        raise UsageError(f"{path / 'run.json'}: no schema_version in it")
    if version > SCHEMA_VERSION:
        raise UsageError(f"{path} has {newer(version)}")
    sets = metadata.get("sets")
    if not isinstance(sets, list) or not sets or not all(_is_set_name(name) for name in sets):
        raise UsageError(f"{path / 'run.json'}: no names of validation sets in it")
    summary = read_json(path / "summary.json")

    parts = {table: find_parts(path, table) for table in LOG_TABLES}
    ends = {table: found[-1].end if found else 0 for table, found in parts.items()}
    if summary is not None:
        stated = summary.get("steps")
        last = max(*ends.values(), stated if isinstance(stated, int) else 0)
        for table, end in ends.items():
            if end < last:
                raise missing_steps(path, table, end, last)
    return Run(path, metadata, tuple(sets), summary, min(ends.values()))


def find(ids: Any, among: Any) -> np.ndarray:
    """Where each id is in ``among``, which has every id once; -1 for those it has not.

    >>> find(["b", "x", "b"], ["a", "b"]).tolist()
    [1, -1, 1]
    """
    ids, among = (pa.array(each, pa.string()) for each in (ids, among))
    if len(among) <= ROW_GROUP:
        return pc.index_in(ids, value_set=among).fill_null(-1).to_numpy()
    # Tables of hashes take most: there is one of a part of the ids at a time.
    places = mapped(len(ids), np.int64)
    for own, start in _slices(ids, len(among)):
        coded = own.dictionary_encode()
        known = np.full(len(coded.dictionary), -1)
        for others, first in _slices(among, len(among)):
            found = pc.index_in(others, value_set=coded.dictionary)
            at = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
            known[found.drop_null().to_numpy()] = first + at
        places[start : start + len(own)] = known[coded.indices.to_numpy()]
    return places


def is_twice(ids: pa.Array) -> bool:
    """Whether an id is there more than once.

    >>> is_twice(pa.array(["a", "b"])), is_twice(pa.array(["a", "b", "a"]))
    (False, True)
    """
    for own, start in _slices(ids, len(ids)):
        if len(own.unique()) < len(own):
            return True
        for others, _ in _slices(ids.slice(start + len(own)), len(ids)):
            if pc.any(pc.is_in(others, value_set=own)).as_py():
                return True
    return False


def _slices(ids: pa.Array, count: int) -> Iterator[tuple[pa.Array, int]]:
    """Parts of ids and their places: as many at a time as are few of ``count``."""
    size = max(ROW_GROUP, count // _PARTS)
    return ((ids.slice(start, size), start) for start in range(0, len(ids), size))


def _array(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _is_set_name(name: Any) -> bool:
    return isinstance(name, str) and SET_NAME.fullmatch(name) is not None
