"""Which variants of a test are quick. All others are slow."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest


def some_quick(variants: Iterable[Any], quick: Collection | Callable[[Any], bool]) -> list:
    """Parameters of a test, each a value or a tuple of values, of which some are quick."""
    is_quick = quick if callable(quick) else quick.__contains__
    return [
        pytest.param(
            *(variant if isinstance(variant, tuple) else (variant,)),
            marks=[] if is_quick(variant) else [pytest.mark.slow],
        )
        for variant in variants
    ]


def crossed(*axes: Iterable[Any]) -> list:
    """Every combination of the axes' values; those that are quick have every value of every axis.

    >>> [(param.values, bool(param.marks)) for param in crossed("ab", "xyz")]
    [(('a', 'x'), False), (('a', 'y'), True), (('a', 'z'), False),
     (('b', 'x'), True), (('b', 'y'), False), (('b', 'z'), True)]
    """
    axes: list[Sequence] = [list(axis) for axis in axes]
    sizes = list(map(len, axes))
    quick = {tuple(n % size for size in sizes) for n in range(max(sizes))}
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(axes, places)),
            marks=[] if places in quick else [pytest.mark.slow],
        )
        for places in itertools.product(*map(range, sizes))
    ]
