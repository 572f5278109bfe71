"""Examples as a run lists them, in columns: little more than their texts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from ghostjax.runs.blocks import blocks

BLOCK = 2**13  # examples, so that an excerpt is read with few others
_FIELDS = {"id": pa.string(), "domain": pa.string(), "size": pa.int64(), "excerpt": pa.string()}


class Listed(Sequence[Any]):
    """Examples, each its id, domain, size and excerpt, that grow at the end; ``make`` makes one of
    these.

    >>> found = Listed(tuple)
    >>> found.add(("a:0", "a", 3, "one"))
    >>> len(found), found[0], [len(table) for table in found.tables()]
    (1, ('a:0', 'a', 3, 'one'), [1])
    """

    def __init__(self, make: Callable[[Iterable[Any]], Any]):
        self._make = make
        self._full: list[pa.Table] = []
        self._last: list[Sequence[Any]] = []

    def add(self, row: Sequence[Any]) -> None:
        self._last.append(row)
        if len(self._last) == BLOCK:
            self._full += in_tables(self._last)
            self._last = []

    def tables(self) -> Iterator[pa.Table]:
        """All of them in order, ``BLOCK`` at a time."""
        yield from self._full
        yield from in_tables(self._last)

    def __len__(self) -> int:
        return len(self._full) * BLOCK + len(self._last)

    def __getitem__(self, n: int) -> Any:
        block, place = divmod(int(n), BLOCK)
        if block == len(self._full):
            return self._make(self._last[place])
        return self._make(column[place].as_py() for column in self._full[block].columns)

    def __iter__(self) -> Iterator[Any]:
        for table in self._full:
            yield from map(self._make, zip(*(column.to_pylist() for column in table.columns)))
        yield from map(self._make, self._last)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 has a text, and so a table can: it has no lone surrogates.

    >>> is_unicode("ü"), is_unicode("\\ud800")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_tables(rows: Iterable[Sequence[Any]]) -> Iterator[pa.Table]:
    """Examples in tables of ``BLOCK``, as they come."""
    for block in blocks(rows, BLOCK):
        columns = zip(*block, strict=True)
        arrays = [pa.array(own, kind) for own, kind in zip(columns, _FIELDS.values(), strict=True)]
        yield pa.table(arrays, list(_FIELDS))
