"""A digest inside the file that it is of, so that one changed byte anywhere is noticed.

The digest is SHA-256 of the file with zeros in the place of the digest. What a format checks by
itself is less: the pages of Parquet can have checksums, its footer and the heads of its pages
cannot, and JSON has none at all.
"""

import hashlib
import os
import re
from typing import IO

_NAME = b"ghostjax sha256 "
_ZEROS = b"0" * 64
_SEAL = re.compile(re.escape(_NAME) + rb"([0-9a-f]{64})")
_BLOCK = 2**20  # bytes that are read at once

BLANK = (_NAME + _ZEROS).decode()


def seal(file: IO[bytes]) -> None:
    """Puts the digest of a file, open for reading and writing, in the place of its last ``BLANK``.

    >>> import io
    >>> file = io.BytesIO(b"text, " + BLANK.encode())
    >>> seal(file)
    >>> changed = io.BytesIO(file.getvalue().replace(b"text", b"test"))
    >>> is_sealed(file), is_intact(file), is_intact(changed)
    (True, True, False)

    Raises:
      ValueError: there is no ``BLANK``.
    """
    place, found = _last_seal(file)
    if found != _ZEROS:
        raise ValueError("there is no place for a digest.")
    digest = _digest(file, place)
    file.seek(place)
    file.write(digest)


def is_sealed(file: IO[bytes]) -> bool:
    """Whether there is a digest."""
    return _last_seal(file)[1] is not None


def is_intact(file: IO[bytes]) -> bool:
    """Whether there is a digest, and the last one is that of the content."""
    place, found = _last_seal(file)
    return found is not None and _digest(file, place) == found


def _last_seal(file: IO[bytes]) -> tuple[int, bytes | None]:
    """Where the last digest of a file is, and the digest; looked for from the end."""
    start = file.seek(0, os.SEEK_END)
    length = len(_NAME) + len(_ZEROS)
    while start > 0:
        end, start = start + length - 1, max(0, start - _BLOCK)
        file.seek(start)
        found = list(_SEAL.finditer(file.read(end - start)))
        if found:
            return start + found[-1].start(1), found[-1][1]
    return 0, None


def _digest(file: IO[bytes], place: int) -> bytes:
    """The digest of a file with zeros from ``place`` on."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, place, _BLOCK):
        digest.update(file.read(min(_BLOCK, place - start)))
    digest.update(_ZEROS)
    file.seek(place + len(_ZEROS))
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest().encode()
