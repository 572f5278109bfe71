"""What two examples may have in common: sets of numbers, of which the shared part is measured."""

import numpy as np

SHINGLE = 8  # bytes, as many as a number of an array [n] uint64 has


def text_elements(text: bytes) -> np.ndarray:
    """All stretches of eight bytes that a text has, each once: uint64 [n], ascending.

    Upper and lower case, and blanks of any kind and number, are the same.

    >>> len(text_elements(b"to be or not to be or not")), len(text_elements(b"to be"))
    (13, 1)
    >>> bool((text_elements(b"One  two\\nthree") == text_elements(b"one two THREE")).all())
    True
    """
    plain = " ".join(text.decode(errors="replace").lower().split()).encode()
    padded = np.frombuffer(plain.ljust(SHINGLE, b"\0"), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(padded, SHINGLE)
    return np.unique(np.ascontiguousarray(windows).view(np.uint64))


def array_elements(*arrays: np.ndarray) -> np.ndarray:
    """All numbers of arrays, each with its place: uint64 [n], ascending.

    >>> a, b = np.array([0.5, 1.0, 2.0]), np.array([0.5, 2.0, 1.0])
    >>> len(np.intersect1d(array_elements(a), array_elements(b)))
    1
    """
    numbers = np.concatenate([np.asarray(array, np.float64).reshape(-1) for array in arrays])
    bits = (numbers + 0.0).view(np.uint64)  # one zero, not two
    places = np.arange(len(bits), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique(bits ^ places)
