"""Mixture weights of a run's domains."""

from typing import NamedTuple

import numpy as np

from ghostjax.runs.analysis.domains import by_domain
from ghostjax.runs.analysis.values import Valued
from ghostjax.runs.errors import UsageError
from ghostjax.selection import mixture


class Share(NamedTuple):
    """One domain in a mixture.

    Attributes:
      name: the domain's.
      visited: its share of the visits.
      value: what the run would have taken off the validation loss with all its visits in this
        domain, to first order: visits of the run times value per visit.
      weight: its share in the mixture.
    """

    name: str
    visited: float
    value: float
    weight: float


def domain_mixture(values: dict[str, Valued], rate: float) -> list[Share]:
    """The run's domains with their weights, ``selection.mixture`` of their values.

    Values are means over the validation sets, and ``visited`` is the prior. As one step with the
    sum of the values makes up for steps with values of their own, this is where DoGE would have
    arrived along the run, had the data not changed on the way.

    Raises:
      UsageError: a domain was not visited, or has a value that is not finite.
    """
    by_set = [sorted(by_domain(valued)) for valued in values.values()]
    names = [one.name for one in by_set[0]]
    visits = np.array([one.visits for one in by_set[0]])
    unvisited = ", ".join(name for name, count in zip(names, visits) if not count)
    if unvisited:
        raise UsageError(
            f"no example of domain {unvisited} was visited so far: without a value, no mixture"
        )
    per_visit = np.mean([[one.total for one in found] for found in by_set], axis=0) / visits
    found = visits.sum() * per_visit
    broken = [name for name, value in zip(names, found) if not np.isfinite(value)]
    if broken:
        raise UsageError(f"domain {', '.join(broken)} has a value that is not finite")
    prior = visits / visits.sum()
    weights = np.asarray(mixture(np.float32(found), np.float32(prior), rate=rate))
    shares = map(Share, names, prior.tolist(), found.tolist(), weights.tolist())
    return sorted(shares, key=lambda share: -share.weight)
