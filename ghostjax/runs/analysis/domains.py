"""What the examples of each domain come to."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ghostjax.runs.analysis.values import By, Valued


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
    coded = pa.array(valued.domains, pa.string()).dictionary_encode()
    codes, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    ends = np.cumsum(np.bincount(codes))
    groups = dict(zip(names, np.split(np.argsort(codes, kind="stable"), ends[:-1])))
    found = []
    for name in sorted(names):
        own = valued.select(groups[name])
        measured = own.ranked(by).measured(by)[0]
        total, visits = float(own.values[own.visits > 0].sum()), int(own.visits.sum())
        figures = [np.nan] * 3
        if len(measured):
            figures = map(float, (measured.mean(), np.median(measured), (measured > 0).mean()))
        found.append(Domain(name, len(own), visits, total, measured, *figures))
    return sorted(found, key=lambda one: (not len(one.measured), -np.nan_to_num(one.mean)))
