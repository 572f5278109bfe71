"""Digests of data and parameters: whether a run goes on with what it began with."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


def fingerprint(tree: Any) -> str:
    """SHA-256 of the leaves of a tree: parameters, arrays, or a list of texts or bytes.

    Equal for trees whose leaves are equal in number, shape, dtype and every bit, in the order of
    their paths, and otherwise different. The names of the paths do not count. A leaf that is an
    iterator stands for what it gives.

    >>> fingerprint(["ab", "c"]) == fingerprint(["a", "bc"])
    False
    >>> fingerprint(iter(["ab", "c"])) == fingerprint(["ab", "c"])
    True

    Raises:
      TypeError: a leaf is no array, number, text or bytes.
    """
    return fingerprints({"": tree})[1]


def fingerprints(parts: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """``fingerprint`` of every part and of all of them, each read once."""
    whole, found = hashlib.sha256(), {}
    for name in sorted(parts):
        own = hashlib.sha256()
        for data in _data(parts[name]):
            own.update(data)
            whole.update(data)
        found[name] = own.hexdigest()
    return found, whole.hexdigest()


def _data(tree: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Iterator)):
        if isinstance(leaf, Iterator):
            for each in leaf:
                yield from _of_leaf(each)
        else:
            yield from _of_leaf(leaf)


def _of_leaf(leaf: Any) -> tuple[Any, Any]:
    if isinstance(leaf, str | bytes):
        # Lone surrogates are in some file names and texts.
        data = leaf.encode(errors="surrogatepass") if isinstance(leaf, str) else leaf
        head = f"{type(leaf).__name__} {len(data)}"
    else:
        array = np.asarray(leaf)
        if array.dtype.hasobject:
            raise TypeError(f"no fingerprint of a {type(leaf).__name__}.")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        head = f"{array.dtype} {array.shape}"
    return f"{head}\n".encode(), data
