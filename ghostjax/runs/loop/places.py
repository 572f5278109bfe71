"""Where ids are in a list that grows, without keeping the ids."""

from collections.abc import Callable

import numpy as np

_NEW = 2**12  # ids


class Places:
    """Finds an id's place by its hash: 16 bytes are kept of each, but of the latest ninth.

    Args:
      read: the id at a place.

    >>> names = ["a", "b"]
    >>> places = Places(names.__getitem__)
    >>> for place, name in enumerate(names):
    ...     places.add(name, place)
    >>> places.find("b"), places.find("c")
    (1, None)
    """

    def __init__(self, read: Callable[[int], str]):
        self._read = read
        self._hashes, self._places = np.zeros((2, 0), np.int64)  # by ascending hash
        self._new: dict[str, int] = {}

    def find(self, name: str) -> int | None:
        if name in self._new:
            return self._new[name]
        at = int(np.searchsorted(self._hashes, hash(name)))
        while at < len(self._hashes) and self._hashes[at] == hash(name):
            if self._read(place := int(self._places[at])) == name:
                return place
            at += 1
        return None

    def add(self, name: str, place: int) -> None:
        """Takes in one that is not there."""
        self._new[name] = place
        if len(self._new) > max(_NEW, len(self._hashes) // 8):
            hashes = np.append(self._hashes, np.fromiter(map(hash, self._new), np.int64))
            places = np.append(self._places, np.fromiter(self._new.values(), np.int64))
            order = np.argsort(hashes)
            self._hashes, self._places, self._new = hashes[order], places[order], {}
