"""What the log has of every visit: losses, norms of gradients and scores."""

from typing import NamedTuple

import numpy as np

from ghostjax.runs.analysis.values import weights_of_steps
from ghostjax.runs.store.run import Run


class Visits(NamedTuple):
    """A number of visits, over those visits of each of n examples that have it, scored or not.

    Attributes:
      mean, first, last: float64 [n], NaN where no visit has it.
    """

    mean: np.ndarray
    first: np.ndarray
    last: np.ndarray


def of_visits(run: Run, column: str) -> Visits:
    """A column of the log's visits, in the order of the run's examples.

    Raises:
      UsageError: as ``Run.visits``.
    """
    count = len(run.ids)
    visits, (sums, first, last) = np.zeros(count, np.int64), np.full((3, count), np.nan)
    sums[:] = 0
    for some in run.visits(column):
        known = np.isfinite(some[column])
        places, numbers = some["place"][known], some[column][known]
        # The log is in the order of steps. Of several assignments to one place, the last one stays.
        last[places] = numbers
        new = visits[places] == 0
        first[places[new][::-1]] = numbers[new][::-1]
        np.add.at(visits, places, 1)
        np.add.at(sums, places, numbers)
    return Visits(np.where(visits > 0, sums / np.maximum(visits, 1), np.nan), first, last)


def scores_by_domain(
    run: Run, which: str, bins: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """The scores for a validation set, added up by domain in stretches of the steps.

    Args:
      bins: int [s + 1], the edges of the stretches.

    Returns:
      The d domains that were visited, that with the most visits first; sums and numbers of the
      scores, [d, s] each; and [2, steps], the summed scores of every step and their summed sizes.
    """
    coded = run.domains.dictionary_encode()
    code_of, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    visits, of_steps = np.zeros(len(names), np.int64), np.zeros((2, run.end))
    sums, counts = np.zeros((2, len(names), len(bins) - 1))
    for some in run.visits(f"score_{which}"):
        codes, scores = code_of[some["place"]], some[f"score_{which}"]
        visits += np.bincount(codes, minlength=len(names))
        known = np.isfinite(scores)
        steps, scores = some["step"][known], scores[known]
        at = codes[known], np.searchsorted(bins, steps, side="right") - 1
        np.add.at(sums, at, scores)
        np.add.at(counts, at, 1)
        np.add.at(of_steps[0], steps, scores)
        np.add.at(of_steps[1], steps, np.abs(scores))
    order = sorted(np.flatnonzero(visits).tolist(), key=lambda n: (-visits[n], names[n]))
    return [names[n] for n in order], sums[order], counts[order], of_steps


def sums_of_steps(run: Run, which: str, places: np.ndarray) -> np.ndarray:
    """[m, steps], what the visits of each step add to the values of m examples."""
    weights, found = weights_of_steps(run, which), np.zeros((len(places), run.end))
    for some in run.visits(f"score_{which}"):
        steps, scores = some["step"], weights[some["step"]] * some[f"score_{which}"]
        for own, place in zip(found, places):
            mine = (some["place"] == place) & np.isfinite(scores)
            np.add.at(own, steps[mine], scores[mine])
    return found
