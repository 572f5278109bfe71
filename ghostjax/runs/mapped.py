"""Numbers and texts of very many examples, in temporary files that are mapped into memory: the
system holds what is in use, and gives up the rest where memory is short."""

import array
import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa

from ghostjax.runs.errors import UsageError

SMALL = 2**20  # bytes that stay in memory, so that small runs need no files
_MOST = 2**31 - 1  # bytes of the texts of an Arrow array


def mapped(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, as ``np.zeros``.

    >>> mapped((2, 3), np.int64).sum()
    np.int64(0)

    Raises:
      UsageError: the file cannot be written; so do the others here.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= SMALL:
        return np.zeros(shape, dtype)
    with _disk_errors(), tempfile.TemporaryFile() as file:
        # A page for which a full disk has no room would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype).reshape(shape)


def mapped_range(count: int) -> np.ndarray:
    """As ``np.arange``.

    >>> mapped_range(3).tolist()
    [0, 1, 2]
    """
    found = mapped(count, np.int64)
    found[1:] = 1
    return np.cumsum(found, out=found)


class Growing:
    """Numbers that are added one by one, or their bytes.

    Args:
      code: their kind, as ``array.array`` has it.

    >>> numbers = Growing("I")
    >>> numbers.append(7)
    >>> len(numbers), numbers.whole()
    (1, array([7], dtype=uint32))
    """

    def __init__(self, code: str):
        self._new, self._before = array.array(code), 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return self._before + len(self._new)

    def append(self, number: int) -> None:
        self._new.append(number)
        if len(self._new) * self._new.itemsize > SMALL:
            self._flush()

    def add(self, data: Any) -> None:
        """Takes in the bytes of numbers."""
        self._new.frombytes(data)
        if len(self._new) * self._new.itemsize > SMALL:
            self._flush()

    def whole(self) -> np.ndarray:
        """All of them; nothing can be added then."""
        dtype = np.dtype(self._new.typecode)
        if self._file is None:
            return np.frombuffer(self._new, dtype)
        self._flush()
        with _disk_errors(), self._file as file:
            file.flush()
            return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype)

    def _flush(self) -> None:
        with _disk_errors():
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(self._new)
        self._before += len(self._new)
        del self._new[:]


def mapped_texts(parts: Iterable[pa.Array]) -> pa.Array:
    """Texts in one array, from arrays of them that have no nulls.

    >>> mapped_texts([pa.array(["a", "bc"]), pa.array(["", "d"])]).to_pylist()
    ['a', 'bc', '', 'd']
    """
    ends, data = Growing("i"), Growing("B")
    ends.append(0)
    for part in parts:
        _, offsets, texts = part.buffers()
        own = np.frombuffer(offsets, np.int32)[part.offset : part.offset + len(part) + 1]
        shift = len(data) - int(own[0])
        if shift + int(own[-1]) > _MOST:
            raise UsageError(f"more than {_MOST} bytes of ids, or domains: make them shorter")
        ends.add((own[1:] + np.int32(shift)).tobytes())
        if own[-1] > own[0]:
            data.add(memoryview(texts)[own[0] : own[-1]])
    count, buffers = len(ends) - 1, (ends.whole(), data.whole())
    return pa.StringArray.from_buffers(count, *map(pa.py_buffer, buffers))


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = tempfile.tempdir or "none of the usual folders"
        raise UsageError(
            f"a temporary file of what is known of every example, in {where}: "
            f"{error.strerror or error}; set TMPDIR to a folder on a disk with room for it, about "
            "200 bytes an example"
        ) from error
