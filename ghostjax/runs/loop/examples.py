"""The training examples that a loop of one's own has, given at first or met on the way."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ghostjax.runs.listed import BLOCK, Listed
from ghostjax.runs.loop.columns import check_unicode, texts_of_ids
from ghostjax.runs.loop.places import Places
from ghostjax.runs.store.run import Run

EXCERPT = 120  # characters
UNKNOWN = "unknown"  # the domain of examples without one
_COLUMNS = ("domain", "size", "excerpt")
_NOTHING = (None,) * len(_COLUMNS)


class Examples:
    """Examples in the order in which they came, in little more memory than their texts take.

    Attributes:
      listed: of each its id, domain, size, which may be None, and excerpt.
      given: how many there were before the first step; None where they are met on the way.
      has_news: whether there are some that were not written yet.
    """

    def __init__(self, given: Mapping[str, Any] | Sequence[Any] | None = None):
        self.listed = Listed(tuple)
        self._places = Places(lambda n: self.listed[n][0])
        self._kind: str | None = None
        self.given: int | None = None
        self.has_news = True
        if given is None:
            return
        columns = dict(given) if isinstance(given, Mapping) else {"id": given}
        unknown = set(columns) - {"id", *_COLUMNS}
        if "id" not in columns or unknown:
            raise ValueError(
                f"examples: expected id and perhaps {', '.join(_COLUMNS)}; got "
                f"{', '.join(map(str, columns))}."
            )
        for ids, kind, rows in _given(columns):
            self._check_kind(kind)
            self._kind = kind
            for one, row in zip(ids.tolist(), rows):
                if self._places.find(one) is not None:
                    raise ValueError(f"examples: id {one!r} is there twice.")
                self._add(one, _filled(row))
        self.given = len(self.listed)

    @classmethod
    def of_run(cls, done: Run, visited: np.ndarray) -> "Examples":
        """Those of a run: given at first, or among the ``visited``, [n] bool."""
        found = cls()
        found.given = done.metadata.get("examples")
        kept = visited.copy()
        kept[: found.given or 0] = True
        for start in range(0, len(kept), BLOCK):
            rows = done.examples.slice(start, BLOCK).filter(pa.array(kept[start : start + BLOCK]))
            for one, *row in zip(*(rows[name].to_pylist() for name in ("id", *_COLUMNS))):
                found._add(one, tuple(row))
        found.has_news = not kept.all()
        return found

    def begins_with(self, others: "Examples") -> bool:
        """Whether all that these began with, if that is known, are the others."""
        count = len(self.listed) if self.given is None else self.given
        return count == len(others.listed) and all(
            own == other for own, other in zip(self.listed, others.listed)
        )

    def check(self, ids: np.ndarray, kind: str, columns: Mapping[str, Any]) -> dict[str, tuple]:
        """The examples of a step that are new, for ``keep``.

        Raises:
          ValueError, TypeError: one is not among the given, is not what it was before, or its id is
            a number where others are texts.
        """
        self._check_kind(kind)
        new: dict[str, tuple] = {}
        for one, row in zip(ids.tolist(), _rows(ids, columns)):
            place = self._places.find(one)
            if place is None and one not in new:
                if self.given is not None:
                    raise ValueError(
                        f"id {one!r} is not among the {self.given} examples that were given: give "
                        "all of them, or none, so that they are taken as they come."
                    )
                new[one] = _filled(row)
                continue
            if row == _NOTHING:
                continue
            before = new[one] if place is None else self.listed[place][1:]
            for name, own, old in zip(_COLUMNS, row, before):
                if own is not None and own != old:
                    raise ValueError(f"id {one!r}: its {name} is {own!r}, but was {old!r} before.")
        return new

    def keep(self, new: Mapping[str, tuple], kind: str) -> None:
        """Takes in what ``check`` gave."""
        for one, row in new.items():
            self._add(one, row)
        self._kind = kind
        self.has_news |= bool(new)

    def _check_kind(self, kind: str) -> None:
        if self._kind not in (None, kind):
            raise TypeError(f"ids are {kind}, but those before were {self._kind}.")

    def _add(self, one: str, row: tuple) -> None:
        self._places.add(one, len(self.listed))
        self.listed.add((one, *row))


def _given(columns: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, str, list[tuple]]]:
    """Ids, what they were, and the rest of each: many at a time, so that lists need no copies."""
    lists = (Sequence, pa.Array, pa.ChunkedArray)
    columns = {
        name: own if isinstance(own, lists) else np.atleast_1d(np.asarray(own))
        for name, own in columns.items()
        if own is not None or name == "id"
    }
    ids = columns.pop("id")
    for name, own in columns.items():
        if len(own) != len(ids):
            raise ValueError(f"{name}: expected one for each of {len(ids)} ids.")
    for start in range(0, len(ids), BLOCK):
        some = slice(start, start + BLOCK)
        found, kind = texts_of_ids(ids[some])
        yield found, kind, _rows(found, {name: own[some] for name, own in columns.items()})


def _rows(ids: np.ndarray, columns: Mapping[str, Any]) -> list[tuple]:
    """Domain, size and excerpt of each, None where it is not told."""
    found = []
    for name in _COLUMNS:
        column = columns.get(name)
        if column is None:
            found.append([None] * len(ids))
            continue
        column = np.asarray(column).tolist()
        if not isinstance(column, list) or len(column) != len(ids):
            raise ValueError(f"{name}: expected one for each of {len(ids)} ids.")
        wanted = int if name == "size" else str
        if not all(isinstance(one, wanted) for one in column):
            raise TypeError(f"{name}: expected {wanted.__name__}, one for each id.")
        if wanted is str:
            for which, text in zip(ids, column):
                check_unicode(f"id {which!r}: its {name}", text)
        found.append(
            [" ".join(one.split())[:80] for one in column] if name == "excerpt" else column
        )
    return list(zip(*found))


def _filled(row: tuple) -> tuple[str, int | None, str]:
    domain, size, excerpt = row
    return UNKNOWN if domain is None else domain, size, excerpt or ""
