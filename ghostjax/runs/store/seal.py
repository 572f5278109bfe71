"""A digest inside the file that it is of, so that one changed byte anywhere is noticed.

The digest is SHA-256 of the file with zeros in the place of the digest. What a format checks by
itself is less: the pages of Parquet can have checksums, its footer and the heads of its pages
cannot, and JSON has none at all.
"""

import hashlib
import re

_NAME = b"ghostjax sha256 "
_ZEROS = b"0" * 64
_SEAL = re.compile(re.escape(_NAME) + rb"([0-9a-f]{64})")

BLANK = (_NAME + _ZEROS).decode()


def seal(content: bytes) -> bytes:
    """``content``, with its digest in the place of the last ``BLANK``.

    >>> sealed = seal(b"text, " + BLANK.encode())
    >>> is_sealed(sealed), is_intact(sealed), is_intact(sealed.replace(b"text", b"test"))
    (True, True, False)

    Raises:
      ValueError: there is no ``BLANK``.
    """
    place = content.rindex(BLANK.encode()) + len(_NAME)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:place] + digest + content[place + len(digest) :]


def is_sealed(content: bytes) -> bool:
    """Whether there is a digest."""
    return _SEAL.search(content) is not None


def is_intact(content: bytes) -> bool:
    """Whether there is a digest, and the last one is that of the content."""
    seals = list(_SEAL.finditer(content))
    if not seals:
        return False
    start, end = seals[-1].span(1)
    blank = content[:start] + _ZEROS + content[end:]
    return hashlib.sha256(blank).hexdigest().encode() == seals[-1][1]
