"""Files that are complete or absent and tell when they were changed; one writer per directory."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.store import schema
from ghostjax.runs.store.seal import BLANK, is_intact, is_sealed, seal

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
        with aside.open("wb") as file:
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
    write_file(path, lambda file: file.write(seal(text.encode())))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, without its digest, or None without the file.

    Raises:
      UsageError: it cannot be read, is no object, or was changed. Only what says that it is of a
        schema version before digests needs none.
    """
    try:
        content = path.read_bytes()
        if is_sealed(content) and not is_intact(content):
            raise UsageError(f"{path}: {_CHANGED}")
        value = json.loads(content)
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
    if not is_sealed(content) and _needs_digest(value.get("schema_version")):
        raise UsageError(f"{path}: its digest is missing")
    value.pop(_DIGEST, None)
    return value


def write_table(path: Path, table: pa.Table) -> None:
    """``write_file`` for a table, as Parquet with its digest and checksums of its pages."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_DIGEST: BLANK})
    content = seal(sink.getvalue().to_pybytes())
    write_file(path, lambda file: file.write(content))


def read_table(path: Path, table: str, sets: Sequence[str]) -> pa.Table:
    """A table in the columns of ``schema.table_schema``.

    Columns that are newer than the file are null.

    Raises:
      UsageError: one line that names the file: it is missing, cannot be read, was changed since it
        was written, has other columns than a table of its schema version, or is of a newer one.
    """
    try:
        content = path.read_bytes()
        if is_sealed(content) and not is_intact(content):
            raise UsageError(f"{path} cannot be read: {_CHANGED}")
        rows = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path} cannot be read: {reason}") from error
    version = _version((rows.schema.metadata or {}).get(b"schema_version"))
    if version > schema.SCHEMA_VERSION:
        raise UsageError(f"{path} has {schema.newer(version)}")
    if not is_sealed(content) and _needs_digest(version):
        raise UsageError(f"{path} cannot be read: its digest is missing")
    written = schema.table_schema(table, sets, version)
    # Which columns may be null is for writers.
    if (rows.schema.names, rows.schema.types) != (written.names, written.types):
        columns = ", ".join(f"{field.name} {field.type}" for field in written)
        raise UsageError(f"{path}: expected the columns {columns}")
    fields = schema.table_schema(table, sets)
    columns = [
        rows[field.name] if field.name in written.names else pa.nulls(len(rows), field.type)
        for field in fields
    ]
    return pa.table(columns, schema=fields)


def _version(stated: bytes | None) -> int:
    """What a table states, or the newest, which asks the most of it."""
    return int(stated) if stated is not None and stated.isdigit() else schema.SCHEMA_VERSION


def _needs_digest(version: Any) -> bool:
    return not (type(version) is int and 1 <= version < schema.DIGESTS_SINCE)
