"""Reading a run directory, whether the run is over, going on or was cut off."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.files import read_json, read_table
from ghostjax.runs.store.log import find_parts, missing_steps, read_part
from ghostjax.runs.store.schema import LOG_TABLES, SCHEMA_VERSION, SET_NAME, newer, table_schema


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory. Tables are read when they are first asked for, and kept.

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
        return getattr(self, table)[column].to_numpy(zero_copy_only=False).astype(np.float64)

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
                rows.append(read_part(part, table, self.sets))
        joined = pa.concat_tables(rows)
        return joined.slice(0, np.searchsorted(joined["step"].to_numpy(), self.end))


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


def _is_set_name(name: Any) -> bool:
    return isinstance(name, str) and SET_NAME.fullmatch(name) is not None
