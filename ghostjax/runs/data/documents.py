"""Documents, and reading them from files, of which they are a part each."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from ghostjax.runs.blocks import blocks
from ghostjax.runs.data.shards import Fields, Recent, Shard, open_shard
from ghostjax.runs.data.task import Skipped, check_stems
from ghostjax.runs.errors import UsageError
from ghostjax.runs.listed import is_unicode
from ghostjax.runs.mapped import Growing

MIN_BYTES = 2
MIN_TOKENS = 2  # one token to read and one to predict

EXCERPT = 120  # bytes
BLOCK = 256  # documents that are measured together
_ROWS, _PARTS = 2**16, 64  # of ids that are looked at together


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, encoded in UTF-8, with its id and domain."""

    id: str
    domain: str
    text: bytes

    def excerpt(self) -> str:
        """The beginning, on one line and printable: what is not becomes a blank.

        >>> Document("a:0", "a", b"one\\n  two\\x1b[0m").excerpt()
        'one two [0m'
        """
        text = self.text[:EXCERPT].decode(errors="replace")
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " for c in text)
        return " ".join(text.split())


def is_long_enough(text: bytes, size: int) -> bool:
    """Whether a text of ``size`` tokens can be used."""
    return len(text) >= MIN_BYTES and size >= MIN_TOKENS


class Documents(Sequence[Document]):
    """The documents of files, which are read again whenever one is asked for. Of each are kept 16
    bytes, in files that are mapped: where it is, its index in its file, and its size. As PyGrain
    has it, a ``RandomAccessDataSource``.

    Attributes:
      sizes: uint32 [n], as ``read_documents`` measured them.
    """

    def __init__(self, shards: Sequence[Shard], fields: Fields):
        self._shards, self._fields = shards, fields
        self._without: list[Path] = []  # the files without any
        self._ends: list[int] = []  # of each shard, how many documents there are up to its end
        self._growing = Growing("q"), Growing("I"), Growing("I")

    def _finish(self) -> None:
        self._at, self._index, self.sizes = (each.whole() for each in self._growing)
        del self._growing

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, n: int) -> Document:
        if not 0 <= n < len(self):
            raise IndexError(n)
        shard = self._shard_of(n)
        at, index = int(self._at[n]), int(self._index[n])
        return _document(shard, f"document {index}", shard.read(at), self._fields, index)

    def __iter__(self) -> Iterator[Document]:
        """All in order, much faster than one by one."""
        n = 0
        for shard, end in zip(self._shards, self._ends):
            for index, record in enumerate(shard.scan() if n < end else ()):
                if n < end and record.at == self._at[n]:
                    where = f"{shard.unit} {record.number}"
                    yield _document(shard, where, record.fields, self._fields, index)
                    n += 1

    def id(self, n: int) -> str:
        """The id of one, whose text is not read where the file's name has the id."""
        if self._fields.id is not None:
            return self[n].id
        return f"{self._shard_of(n).path.stem}:{self._index[n]}"

    def ids(self) -> Iterator[str]:
        """All ids in order."""
        if self._fields.id is not None:
            return (document.id for document in self)
        return map(self.id, range(len(self)))

    def _shard_of(self, n: int) -> Shard:
        return self._shards[int(np.searchsorted(self._ends, n, side="right"))]

    def _add(
        self, shard: Shard, measure: Callable[[list[bytes]], Sequence[int]], skipped: Skipped
    ) -> Iterator[str]:
        """Takes in a shard; yields the ids of all that is in it, of what is skipped, too."""
        index, filled = -1, 0
        places, indices, all_sizes = self._growing
        for block in blocks(enumerate(shard.scan()), BLOCK):
            found = [
                _document(shard, f"{shard.unit} {record.number}", record.fields, self._fields, n)
                for n, record in block
            ]
            yield from (document.id for document in found)
            sizes = measure([document.text for document in found])
            for (index, record), document, size in zip(block, found, sizes, strict=True):
                filled += len(document.text) >= MIN_BYTES
                if not is_long_enough(document.text, size):
                    skipped.add(shard.place(record.number))
                    continue
                places.append(record.at)
                indices.append(index)
                all_sizes.append(size)
        if index < 0:
            skipped.add(str(shard.path))
        if not filled:
            self._without.append(shard.path)
        self._ends.append(len(places))


def read_documents(
    paths: Collection[Path],
    fields: Fields | None = None,
    measure: Callable[[list[bytes]], Sequence[int]] | None = None,
    skipped: Skipped | None = None,
) -> Documents:
    """The documents of .txt (blocks between blank lines), .jsonl (lines) and .parquet (rows) files.

    Where ``fields``, by default ``Fields()``, has none for them, ids are ``stem:index`` with the
    document's index in its file, from 0, and the domain is the stem. Texts of fewer than two bytes
    or tokens are skipped, and keep their index; so are files in which there is nothing, as some of
    many may be.

    Args:
      measure: of texts, how many tokens they have. None: as many as bytes.
      skipped: is told of those that are.

    Raises:
      UsageError: a file is missing, unreadable or of another kind, or all are without a document;
        two files have one stem, two documents have one id, a line is not a JSON object, or a field
        is missing or of another type. The message names the file and, where there is one, the line
        or row.
    """
    fields = fields or Fields()
    if fields.id is None:
        check_stems(paths)
    recent = Recent()
    shards = [open_shard(path, fields, recent) for path in paths]
    found = Documents(shards, fields)
    skipped, ids = skipped or Skipped(), Ids()
    for shard in shards:
        for own in found._add(shard, measure or (lambda texts: list(map(len, texts))), skipped):
            if fields.id is not None:
                ids.add(own)
    found._finish()
    if len(found._without) == len(shards):
        others = f", nor in {len(shards) - 1} other files" if len(shards) > 1 else ""
        raise UsageError(
            f"{found._without[0]}: no documents in it of at least {MIN_BYTES} bytes{others}"
        )
    twice = ids.twice()
    if twice is not None:
        every = ((shard, record) for shard in shards for record in shard.scan())
        one, other = (next(itertools.islice(every, n, None)) for n in _steps(twice))
        name = str(other[1].fields[fields.id])
        places = [shard.place(record.number) for shard, record in (other, one)]
        raise UsageError(f"{places[0]}: id {name!r} is that of {places[1]} too")
    return found


def _steps(places: tuple[int, int]) -> tuple[int, int]:
    """How many to pass over before each of two places, of one iterator."""
    return places[0], places[1] - places[0] - 1


class Ids:
    """Finds out whether of many ids one is there twice: of each 16 bytes are in a file."""

    def __init__(self) -> None:
        self._hashes = Growing("Q")

    def add(self, name: str) -> None:
        encoded = name.encode(errors="surrogatepass")
        self._hashes.add(hashlib.blake2b(encoded, digest_size=16).digest())

    def twice(self) -> tuple[int, int] | None:
        """The place of the first that was there before, behind the place where it was; or None.

        >>> ids = Ids()
        >>> for name in "abcba":
        ...     ids.add(name)
        >>> ids.twice()
        (1, 3)
        """
        hashes = self._hashes.whole().reshape(-1, 2)
        count = min(_PARTS, 1 + len(hashes) // _ROWS)
        found = [pair for part in range(count) for pair in _twice(hashes, part, count)]
        return min(found, key=lambda pair: pair[1], default=None)


def _twice(hashes: np.ndarray, part: int, parts: int) -> list[tuple[int, int]]:
    """As ``Ids.twice``, of those hashes alone that are in one of so many parts."""
    own = np.concatenate(
        [
            start + np.flatnonzero(hashes[start : start + _ROWS, 0] % parts == part)
            for start in range(0, len(hashes), _ROWS)
        ]
        or [np.zeros(0, np.int64)]
    )
    first, second = hashes[own].T
    order = np.lexsort((first, second))
    same = np.flatnonzero(
        (first[order[1:]] == first[order[:-1]]) & (second[order[1:]] == second[order[:-1]])
    )
    return [
        (int(own[order[n]]), int(own[order[n + 1]])) for n in same[np.argsort(order[same + 1])[:1]]
    ]


def _document(
    shard: Shard, where: str, record: dict[str, Any], fields: Fields, index: int
) -> Document:
    def value(field: str, option: str, kinds: type | UnionType) -> Any:
        found = record.get(field, record)  # no field is the record itself
        if isinstance(found, kinds) and not isinstance(found, bool):
            return found
        place = f"{shard.path}, {where}"
        if field not in record:
            raise UsageError(f"{place}: no field {field!r} (set --{option})")
        wanted = "a string" if kinds is str else "a string or an integer"
        raise UsageError(f"{place}: field {field!r} is not {wanted} but {type(found).__name__}")

    text, stem = value(fields.text, "text-field", str), shard.path.stem
    found = Document(
        f"{stem}:{index}" if fields.id is None else str(value(fields.id, "id-field", str | int)),
        stem if fields.domain is None else str(value(fields.domain, "domain-field", str | int)),
        # JSON can hold lone surrogates, which UTF-8 cannot.
        text.encode(errors="replace"),
    )
    for what, name in (("id", found.id), ("domain", found.domain)):
        if not is_unicode(name):
            raise UsageError(
                f"{shard.path}, {where}: its {what} {name!r} is no Unicode text: change it, or the "
                "name of the file where it is from there"
            )
    return found
