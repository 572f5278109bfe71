"""The training examples that a loop of one's own has, given at first or met on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ghostjax.runs.loop.columns import texts_of_ids

EXCERPT = 120  # characters
UNKNOWN = "unknown"  # the domain of examples without one
_COLUMNS = ("domain", "size", "excerpt")


class Examples:
    """Examples in the order in which they came.

    Attributes:
      given: how many there were before the first step; None where they are met on the way.
      has_news: whether there are some that were not written yet.
    """

    def __init__(self, given: Mapping[str, Any] | Sequence[Any] | None = None):
        self._rows: dict[str, tuple[str, int | None, str]] = {}
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
        ids, self._kind = texts_of_ids(columns.pop("id"))
        rows = _rows(ids, columns)
        for one, row in zip(ids.tolist(), rows):
            if one in self._rows:
                raise ValueError(f"examples: id {one!r} is there twice.")
            self._rows[one] = _filled(row)
        self.given = len(self._rows)

    @classmethod
    def read(cls, table: pa.Table, given: int | None, visited: set[str]) -> "Examples":
        """Those of a run: given at first, or among the ``visited``."""
        found = cls()
        found.given = given
        columns = (table[name].to_pylist() for name in ("id", *_COLUMNS))
        for n, (one, *row) in enumerate(zip(*columns)):
            if n < (given or 0) or one in visited:
                found._rows[one] = tuple(row)
        found.has_news = len(found._rows) < len(table)
        return found

    def columns(self) -> list[list[Any]]:
        """Ids, domains, sizes and excerpts."""
        return [list(self._rows), *map(list, zip(*self._rows.values()))] if self._rows else [[]] * 4

    def check(self, ids: np.ndarray, kind: str, columns: Mapping[str, Any]) -> dict[str, tuple]:
        """The examples of a step that are new, for ``keep``.

        Raises:
          ValueError, TypeError: one is not among the given, is not what it was before, or its id is
            a number where others are texts.
        """
        if self._kind not in (None, kind):
            raise TypeError(f"ids are {kind}, but those before were {self._kind}.")
        new: dict[str, tuple] = {}
        for one, row in zip(ids.tolist(), _rows(ids, columns)):
            before = self._rows.get(one, new.get(one))
            if before is None:
                if self.given is not None:
                    raise ValueError(
                        f"id {one!r} is not among the {self.given} examples that were given: give "
                        "all of them, or none, so that they are taken as they come."
                    )
                new[one] = _filled(row)
                continue
            for name, own, old in zip(_COLUMNS, row, before):
                if own is not None and own != old:
                    raise ValueError(f"id {one!r}: its {name} is {own!r}, but was {old!r} before.")
        return new

    def keep(self, new: Mapping[str, tuple], kind: str) -> None:
        """Takes in what ``check`` gave."""
        self._rows.update(new)
        self._kind = kind
        self.has_news |= bool(new)


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
        found.append(
            [" ".join(one.split())[:80] for one in column] if name == "excerpt" else column
        )
    return list(zip(*found))


def _filled(row: tuple) -> tuple[str, int | None, str]:
    domain, size, excerpt = row
    return UNKNOWN if domain is None else domain, size, excerpt or ""
