"""Files that are complete or absent and tell when they were changed; one writer per directory."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.store import schema
from ghostjax.runs.store.seal import BLANK, is_intact, is_sealed, seal

ROW_GROUP = 2**16  # rows that are written, and read, together

_DIGEST = "digest"
_CHANGED = "it changed since it was written, as its digest tells: put back a copy"


def check_out(out: Path) -> None:
    """Raises ``UsageError`` unless ``out`` is new or an empty directory."""
    try:
        if out.is_dir():
            if any(not _is_partial(path.name) for path in out.iterdir()):
                raise UsageError(f"{out} is not empty: give a new directory")
        elif out.exists() or out.is_symlink():
            raise UsageError(f"{out} is not a directory: give a new one")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror or error}") from error


def _is_partial(name: str) -> bool:
    """Left by a process that was killed while it wrote."""
    return name.startswith(".") and name.endswith(".partial")


def create_out(out: Path) -> None:
    """Makes the run directory, so that a place that cannot be written shows before training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create {out}: {error.strerror or error}") from error
    if not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to {out}")


@contextlib.contextmanager
def disk_errors(out: Path, way_out: Callable[[], str]) -> Iterator[None]:
    """Turns what a full or broken disk raises into one line that says how to go on.

    Raises:
      StoppedError: in the place of ``OSError``.
    """
    try:
        yield
    except BrokenPipeError:  # of stdout or stderr
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoppedError(
            f"cannot write {error.filename or out}: {error.strerror or error}; "
            f"{'make room' if full else 'put that right'}, then {way_out()}"
        ) from error


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keeps other processes from writing the same run directory; a process that dies lets go.

    Raises:
      UsageError: another one is at it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{out}: another process is writing this run") from error
        yield
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Makes the file that ``write`` writes, or replaces it: as a whole or not at all.

    When this returns, the file is on disk and a crash does not lose it. A process that is killed
    leaves nothing, or a file ``.<name>.partial`` beside it, which the next call writes over.

    Raises:
      OSError, or what ``write`` raises: nothing was changed.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Forces the names in a directory to disk, where the system can."""
    with contextlib.suppress(OSError):  # not every system lets a directory be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """``write_file`` for a JSON object, with its digest.

    Raises:
      ValueError: for NaN and infinities, which JSON has not.
    """
    value = {**value, _DIGEST: BLANK}
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def write(file: IO[bytes]) -> None:
        file.write(text.encode(errors="backslashreplace"))  # lone surrogates, as JSON has them
        seal(file)

    write_file(path, write)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, without its digest, or None without the file.

    Raises:
      UsageError: it cannot be read, is no object, or was changed. Only what says that it is of a
        schema version before digests needs none.
    """
    try:
        with path.open("rb") as file:
            has_digest = is_sealed(file)
            if has_digest and not is_intact(file):
                raise UsageError(f"{path}: {_CHANGED}")
            file.seek(0)
            value = json.load(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if not has_digest and _needs_digest(value.get("schema_version")):
        raise UsageError(f"{path}: its digest is missing")
    value.pop(_DIGEST, None)
    return value


def write_table(path: Path, table: pa.Table) -> None:
    """``write_file`` for a table, as Parquet with its digest and checksums of its pages."""
    write_tables(path, table.schema, [table])


def write_tables(path: Path, fields: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """``write_table`` for what these are one after another; a row group each, written as they
    come."""

    def write(file: IO[bytes]) -> None:
        with pq.ParquetWriter(file, fields, write_page_checksum=True) as writer:
            for table in tables:
                writer.write_table(table, ROW_GROUP)
            writer.add_key_value_metadata({_DIGEST: BLANK})
        seal(file)

    write_file(path, write)


def read_table(
    path: Path, table: str, sets: Sequence[str], columns: Collection[str] | None = None
) -> pa.Table:
    """A table in the columns of ``schema.table_schema``, or some of these.

    Columns that are newer than the file are null.

    Raises:
      UsageError: one line that names the file: it is missing, cannot be read, was changed since it
        was written, has other columns than a table of its schema version, or is of a newer one.
    """
    with _opened(path, table, sets) as (source, fields):
        wanted = [f for f in fields if columns is None or f.name in columns]
        known = [f.name for f in wanted if f.name in source.schema_arrow.names]
        rows = source.read(known)
    found = [
        rows[field.name] if field.name in known else pa.nulls(len(rows), field.type)
        for field in wanted
    ]
    return pa.table(found, schema=pa.schema(wanted, fields.metadata))


def read_column(path: Path, table: str, sets: Sequence[str], name: str) -> Iterator[pa.Array]:
    """A column that every version has, in parts; raises as ``read_table``."""
    with _opened(path, table, sets) as (source, _):
        for batch in source.iter_batches(ROW_GROUP, columns=[name]):
            yield batch[name]


@contextlib.contextmanager
def _opened(path: Path, table: str, sets: Sequence[str]) -> Iterator[tuple[Any, pa.Schema]]:
    """A table's file, which is what its digest says, and the newest columns."""
    try:
        with path.open("rb") as file:
            has_digest = is_sealed(file)
            if has_digest and not is_intact(file):
                raise UsageError(f"{path} cannot be read: {_CHANGED}")
            with pq.ParquetFile(file, page_checksum_verification=True) as source:
                yield source, _fields(path, source.schema_arrow, table, sets, has_digest)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path} cannot be read: {reason}") from error


def _fields(
    path: Path, found: pa.Schema, table: str, sets: Sequence[str], has_digest: bool
) -> pa.Schema:
    """What a file should have, once it is known to have what its version should."""
    version = _version((found.metadata or {}).get(b"schema_version"))
    if version > schema.SCHEMA_VERSION:
        raise UsageError(f"{path} has {schema.newer(version)}")
    if not has_digest and _needs_digest(version):
        raise UsageError(f"{path} cannot be read: its digest is missing")
    written = schema.table_schema(table, sets, version)
    # Which columns may be null is for writers.
    if (found.names, found.types) != (written.names, written.types):
        columns = ", ".join(f"{field.name} {field.type}" for field in written)
        raise UsageError(f"{path}: expected the columns {columns}")
    return schema.table_schema(table, sets)


def _version(stated: bytes | None) -> int:
    """What a table states, or the newest, which asks the most of it."""
    return int(stated) if stated is not None and stated.isdigit() else schema.SCHEMA_VERSION


def _needs_digest(version: Any) -> bool:
    return not (type(version) is int and 1 <= version < schema.DIGESTS_SINCE)
