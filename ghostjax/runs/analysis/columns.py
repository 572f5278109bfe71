"""Texts of many examples, of which few are looked at."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 2**16


class Column(Sequence[str]):
    """Texts [n] that are Python's only where one is asked for; ``pa.array`` takes all of them.

    A number gives a text; a mask, indices or a slice a ``Column``; ``==`` a mask [n].

    Args:
      read: the texts of the examples at some places.
      places: int64 [n], where these are.

    >>> texts = pa.array(["a", "b", "c"])
    >>> column = Column(texts.take, np.array([2, 0, 1]))
    >>> column[0], list(column[1:]), (column == "a").tolist()
    ('c', ['a', 'b'], [False, True, False])
    """

    def __init__(self, read: Callable[[np.ndarray], pa.Array], places: np.ndarray):
        self._read, self.places = read, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int | np.integer):
            return self._read(self.places[[which]])[0].as_py()
        return Column(self._read, self.places[which])

    def __iter__(self) -> Iterator[str]:
        for texts in self.parts():
            yield from texts.to_pylist()

    def __eq__(self, text: Any) -> Any:
        found = [pc.equal(own, text).to_numpy(zero_copy_only=False) for own in self.parts()]
        return np.concatenate(found or [np.zeros(0, bool)])

    __hash__ = None

    def parts(self) -> Iterator[pa.Array]:
        """All of them in order, some at a time."""
        for start in range(0, len(self), _BLOCK):
            yield self._read(self.places[start : start + _BLOCK])

    def __arrow_array__(self, type: Any = None) -> pa.Array:
        return self._read(self.places)
