"""Files that are complete or absent, and a directory that one process writes."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.errors import UsageError


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


def write_json(path: Path, value: Any) -> None:
    """``write_file`` for JSON. Raises ``ValueError`` for NaN and infinities, which JSON has not."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def write_table(path: Path, table: pa.Table) -> None:
    """``write_file`` for a table, as Parquet."""
    write_file(path, lambda file: pq.write_table(table, file))
