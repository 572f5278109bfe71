"""Tokens that are made once: counted at first, and hashed when the ids before them have been."""

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np

from ghostjax.runs.data.documents import is_long_enough
from ghostjax.runs.errors import UsageError

_TOKEN = np.dtype(np.int32)


class KeptTokens:
    """The tokens of texts that are long enough, from when they are counted until they are read: in
    a temporary file, so that memory is constant.

    >>> kept = KeptTokens(lambda texts: [np.arange(len(text), dtype=np.int32) for text in texts])
    >>> kept.sizes([b"abc", b"a", b"ab"])
    [3, 1, 2]
    >>> [tokens.tolist() for tokens in kept.read([3, 2])]
    [[0, 1, 2], [0, 1]]

    Args:
      encode: as ``Coder`` has it, int32.

    Raises:
      UsageError: the file cannot be written; so do the methods.
    """

    def __init__(self, encode: Callable[[Sequence[bytes]], list[np.ndarray]]):
        self._encode = encode
        with _disk_errors():
            self._file = tempfile.TemporaryFile(buffering=2**20)  # noqa: SIM115
        self._close = weakref.finalize(self, _close, self._file)  # at the latest

    def sizes(self, texts: Sequence[bytes]) -> list[int]:
        """How many tokens each text has."""
        found = self._encode(texts)
        with _disk_errors():
            for text, tokens in zip(texts, found, strict=True):
                if is_long_enough(text, len(tokens)):
                    self._file.write(tokens.astype(_TOKEN, casting="safe").tobytes())
        return list(map(len, found))

    def read(self, sizes: Iterable[int]) -> Iterator[np.ndarray]:
        """The tokens of all texts in order, of which these are the sizes; the file is gone then."""
        try:
            with _disk_errors():
                self._file.seek(0)
                for size in sizes:
                    yield np.frombuffer(self._file.read(int(size) * _TOKEN.itemsize), _TOKEN)
        finally:
            self._close()


def _close(file: IO[bytes]) -> None:
    """What a full disk did not take is written once more, and nobody needs it."""
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = tempfile.tempdir or "none of the usual folders"
        raise UsageError(
            f"the temporary file of all tokens, in {where}: {error.strerror or error}; "
            f"set TMPDIR to a folder on a disk with room for it, {_TOKEN.itemsize} bytes a token"
        ) from error
