"""Near-duplicates among many examples, by MinHash: in linear time, of pairs that are then checked.

    similarity(a, b) = |A and B| / |A or B|,      A, B: the elements of two examples (Jaccard)

An example's signature are the least of its elements under 128 random orders; two examples agree in
one of them with the probability of their similarity s. They are compared where 4 in a row agree, in
one of 32 bands at least: with probability 1 - (1 - s^4)^32, which is .99 for s = .6 and .9999 for
.7. Whether they are alike is then computed exactly.

Source: Broder, On the resemblance and containment of documents (1997); Leskovec, Rajaraman, Ullman,
Mining of Massive Datasets, chapter 3.
"""

import array
import functools
from collections.abc import Callable, Iterator

import numpy as np

LEAST_SIMILARITY = 0.6  # below, too many pairs would be missed
_BANDS, _ROWS = 32, 4
_BLOCK = 512  # elements at a time
_KEPT = 64  # examples whose elements are kept


def duplicates(
    count: int, elements: Callable[[int], np.ndarray], similarity: float
) -> list[list[int]]:
    """Groups of examples: those of one are linked by pairs of at least this similarity.

    Args:
      count: how many examples there are, n.
      elements: of an example, by its number: uint64 [m], each once.
      similarity: from ``LEAST_SIMILARITY`` to 1.

    Returns:
      Numbers of examples, ascending, of every group of two or more; the largest first.

    Guarantees: 256 bytes for every example and the elements of 64 of them are kept. The same
    examples give the same groups.

    >>> texts = [{1, 2, 3, 4, 5}, {6, 7}, {1, 2, 3, 4}, {7, 6}]
    >>> duplicates(4, lambda n: np.array(sorted(texts[n]), np.uint64), 0.8)
    [[0, 2], [1, 3]]
    """
    elements = functools.lru_cache(_KEPT)(elements)
    keys = np.zeros((_BANDS, count), np.uint64)
    for n in range(count):
        keys[:, n] = band_keys(elements(n))
    group = array.array("q", range(count))

    def root(n: int) -> int:
        while group[n] != n:
            group[n] = n = group[group[n]]
        return n

    for band in keys:
        for alike in _equal(band):
            met: dict[int, list[int]] = {}
            for n in alike:
                met.setdefault(root(n), []).append(n)
                # Against all that it does not belong to yet: of copies, one is enough.
                for other in [other for other in met if other != root(n)]:
                    if any(jaccard(elements(n), elements(m)) >= similarity for m in met[other]):
                        less, more = sorted((met.pop(other), met.pop(root(n))), key=len)
                        group[max(root(n), other)] = min(root(n), other)
                        met[root(n)] = more
                        more.extend(less)
    roots = np.fromiter(map(root, range(count)), np.int64, count)
    return sorted(_equal(roots), key=lambda members: (-len(members), members))


def _equal(keys: np.ndarray) -> Iterator[list[int]]:
    """The places, ascending, of every key that is there twice or more."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(keys))
    several = ends - starts > 1
    for start, end in zip(starts[several], ends[several]):
        yield order[start:end].tolist()


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """
    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def band_keys(elements: np.ndarray) -> np.ndarray:
    """uint64 [bands]: examples are candidates where one of them agrees."""
    factors, shifts = _orders()
    mixed = _mixed(elements)
    least = np.full(_BANDS * _ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(mixed), _BLOCK):
        block = mixed[start : start + _BLOCK, None] * factors + shifts
        least = np.minimum(least, block.min(axis=0))
    keys = np.zeros(_BANDS, np.uint64)
    for row in least.reshape(_BANDS, _ROWS).T:
        keys = _mixed(keys ^ row)
    return keys


@functools.cache
def _orders() -> tuple[np.ndarray, np.ndarray]:
    """The random orders: x -> x * factor + shift, of numbers that are mixed."""
    rng = np.random.default_rng(0)
    factors, shifts = rng.integers(2**64, size=(2, _BANDS * _ROWS), dtype=np.uint64)
    return factors | np.uint64(1), shifts


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Another number for each, of which every bit depends on all of it (the end of MurmurHash3)."""
    numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return numbers ^ (numbers >> np.uint64(33))
