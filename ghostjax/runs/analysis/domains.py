"""What the examples of each domain come to."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ghostjax.runs.analysis.columns import Column
from ghostjax.runs.analysis.values import By, Valued
from ghostjax.runs.mapped import mapped


class Domain(NamedTuple):
    """The examples of one domain.

    Attributes:
      name: the domain's.
      examples, visits: how many it has.
      total: the sum of the values.
      measured: the values, or the values per visit, of those that were visited, in falling order.
      mean, median, helped: of what was measured, and the part that helped; NaN without a visit.
    """

    name: str
    examples: int
    visits: int
    total: float
    measured: np.ndarray
    mean: float
    median: float
    helped: float


def by_domain(valued: Valued, by: By = "value") -> list[Domain]:
    """The domains, that with the highest mean first and those without a visit last."""
    if not len(valued):
        return []
    codes, names, examples = _coded(valued.domains)
    is_visited = valued.visited
    visited, codes = valued.select(is_visited), codes[is_visited]
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    groups = np.split(np.argsort(codes, kind="stable"), ends[:-1])
    found = []
    for name, count, places in sorted(zip(names, examples, groups), key=lambda one: one[0]):
        own = visited.select(places)
        measured = own.ranked(by).measured(by)[0]
        total, visits = float(own.values.sum()), int(own.visits.sum())
        figures = [np.nan] * 3
        if len(measured):
            figures = map(float, (measured.mean(), np.median(measured), (measured > 0).mean()))
        found.append(Domain(name, int(count), visits, total, measured, *figures))
    return sorted(found, key=lambda one: (not len(one.measured), -np.nan_to_num(one.mean)))


def _coded(texts: Sequence[str]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The number of each text, the texts in the order in which they come, and how often they do."""
    parts = texts.parts() if isinstance(texts, Column) else [pa.array(texts, pa.string())]
    number_of: dict[str, int] = {}
    codes, counts, start = mapped(len(texts), np.int32), np.zeros(0, np.int64), 0
    for part in parts:
        own = part.dictionary_encode()
        names = own.dictionary.to_pylist()
        numbers = np.array([number_of.setdefault(name, len(number_of)) for name in names])
        found = numbers[own.indices.to_numpy()]
        codes[start : start + len(part)] = found
        counts = np.append(counts, np.zeros(len(number_of) - len(counts), np.int64))
        np.add.at(counts, found, 1)
        start += len(part)
    return codes, list(number_of), counts
