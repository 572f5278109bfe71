"""What the examples of each domain come to."""

import dataclasses

import numpy as np

from ghostjax.runs.analysis.values import By, Valued


@dataclasses.dataclass(frozen=True)
class Domain:
    """The examples of one domain.

    Attributes:
      name: the domain's.
      examples, visits: how many it has.
      total: the sum of the values.
      measured: the values, or the values per visit, of those that were visited, in falling order.
    """

    name: str
    examples: int
    visits: int
    total: float
    measured: np.ndarray

    @property
    def mean(self) -> float:
        """Of what was measured; NaN, as the next two, without a visit."""
        return float(self.measured.mean()) if len(self.measured) else np.nan

    @property
    def median(self) -> float:
        return float(np.median(self.measured)) if len(self.measured) else np.nan

    @property
    def helped(self) -> float:
        """The part of the visited examples that helped."""
        return float((self.measured > 0).mean()) if len(self.measured) else np.nan


def by_domain(valued: Valued, by: By = "value") -> list[Domain]:
    """The domains, that with the highest mean first and those without a visit last."""
    if not len(valued):
        return []
    names, place, counts = np.unique(
        valued.domains.astype(str), return_inverse=True, return_counts=True
    )
    groups = np.split(np.argsort(place, kind="stable"), np.cumsum(counts)[:-1])
    found = []
    for name, group in zip(names.tolist(), groups):
        own = valued.select(group)
        measured = own.ranked(by).measured(by)[0]
        total, visits = float(own.values.sum()), int(own.visits.sum())
        found.append(Domain(name, len(own), visits, total, measured))
    return sorted(found, key=lambda one: (not len(one.measured), -np.nan_to_num(one.mean)))
