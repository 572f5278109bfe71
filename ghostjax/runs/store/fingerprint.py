"""Digests of data and parameters: whether a run goes on with what it began with."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(tree: Any) -> str:
    """SHA-256 of the leaves of a tree: parameters, arrays, or a list of texts or bytes.

    Equal for trees whose leaves are equal in number, shape, dtype and every bit, in the order of
    their paths, and otherwise different. The names of the paths do not count.

    >>> fingerprint(["ab", "c"]) == fingerprint(["a", "bc"])
    False

    Raises:
      TypeError: a leaf is no array, number, text or bytes.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
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
        digest.update(f"{head}\n".encode())
        digest.update(data)
    return digest.hexdigest()
