"""The training examples of a run with their values, and their order.

Values are computed here alone, in ``sum_visits``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from ghostjax.fidelity import step_weights
from ghostjax.runs.analysis.columns import Column
from ghostjax.runs.analysis.statistics import differs, freedom
from ghostjax.runs.errors import UsageError
from ghostjax.runs.mapped import mapped, mapped_range
from ghostjax.runs.store.run import Run

By = Literal["value", "mean"]
Verdict = Literal["helps", "hurts", "unclear", "few visits", "no error bar", "not visited"]

MIN_VISITS = 8  # an error from fewer tells too little to claim anything


@dataclasses.dataclass(frozen=True)
class Valued:
    """Training examples with their values for one validation set; columns of one length, n.

    Attributes:
      ids, domains, excerpts: [n], texts: a ``Column`` each.
      visits: int64 [n], how many of their visits were scored.
      values, errors: float64 [n], the values and their standard errors; NaN without a visit, and
        the errors also where those of the scores were not measured.
      fourths: float64 [n], the summed fourth powers of the visits' errors.
    """

    ids: Sequence[str]
    domains: Sequence[str]
    excerpts: Sequence[str]
    visits: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    fourths: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, which: np.ndarray) -> "Valued":
        """The examples of a mask or of indices; all of them need no copy."""
        if isinstance(which, np.ndarray) and which.dtype == bool and which.all():
            return self
        return Valued(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    def measured(self, by: By) -> tuple[np.ndarray, np.ndarray]:
        """Values and errors, or those per visit, which are NaN without a visit."""
        if by == "value":
            return self.values, self.errors
        visits = np.where(self.visits > 0, self.visits, np.nan)
        return self.values / visits, self.errors / visits

    @property
    def visited(self) -> np.ndarray:
        """[n] bool."""
        return self.visits > 0

    @property
    def is_told(self) -> np.ndarray:
        """[n] bool: there are an error and visits enough to claim something."""
        return (self.visits >= MIN_VISITS) & self.has_error

    @property
    def has_error(self) -> np.ndarray:
        """[n] bool: there is a standard error."""
        return np.isfinite(self.errors)

    @property
    def apart(self) -> np.ndarray:
        """[n] bool: the value differs from zero; never with fewer than ``MIN_VISITS`` visits."""
        told = np.flatnonzero(self.is_told)  # often few, and quantiles of Student's t take long
        values, errors, fourths = (each[told] for each in (self.values, self.errors, self.fourths))
        found = np.zeros(len(self), bool)
        found[told] = differs(values, errors, freedom(errors**2, fourths, self.visits[told]))
        return found

    @property
    def verdicts(self) -> np.ndarray:
        """[n], of type ``Verdict``: what can be said of each example."""
        codes = np.where(self.values > 0, 0, 1)
        codes[~self.apart] = 2
        codes[~self.is_told] = 3
        codes[~self.has_error] = 4
        codes[~self.visited] = 5
        return np.array(get_args(Verdict), object)[codes]

    def ranked(self, by: By = "value") -> "Valued":
        """The examples that were visited, the most helpful first; ties in their old order."""
        visited = self.select(self.visited)
        # NaN goes last.
        return visited.select(np.argsort(-visited.measured(by)[0], kind="stable"))


class Sums(NamedTuple):
    """What the visits of n examples add up to, for K validation sets.

    Attributes:
      visits: int64 [n], how many were scored.
      values, errors: float64 [n, K], NaN without a visit.
      fourths: float64 [n, K], the summed fourth powers of the visits' errors.
    """

    visits: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    fourths: np.ndarray


def measured(run: Run, column: str) -> np.ndarray | None:
    """A column of the scored steps; None where no step has it, as the loop did not measure it."""
    found = run.numbers("steps", column)[run.scored]
    return None if np.isnan(found).all() else found


def weights_of_steps(run: Run, name: str) -> np.ndarray:
    """What the visits of each step count for a validation set, [steps].

    See ``fidelity.step_weights``.
    """
    decreases = (run.numbers("steps", f"{which}_{name}") for which in ("predicted", "actual"))
    return step_weights(*decreases)


def sum_visits(run: Run) -> Sums:
    """The values so far, in the order of the run's examples and ``run.sets``.

        value = sum over visits of weight[step] * score
        error = sqrt( sum over visits of (weight[step] * error)^2 )

    Raises:
      UsageError: the log holds no steps yet, or as ``Run.visits``.
    """
    if not run.end:
        raise UsageError(f"{run.path}: no steps in the log yet, so there are no values")
    count = len(run.ids)
    visits = mapped(count, np.int64)
    values, squares, fourths = mapped((3, len(run.sets), count), np.float64)
    weights = [weights_of_steps(run, name) for name in run.sets]
    columns = [f"{what}_{name}" for name in run.sets for what in ("score", "error")]
    for some in run.visits(*columns):
        scored = np.isfinite(some[columns[0]])
        step, place = some["step"][scored], some["place"][scored]
        np.add.at(visits, place, 1)
        for k, name in enumerate(run.sets):
            score, error = (
                weights[k][step] * some[f"{what}_{name}"][scored] for what in ("score", "error")
            )
            for sums, own in ((values, score), (squares, error**2), (fourths, error**4)):
                np.add.at(sums[k], place, own)
    errors = np.sqrt(squares, out=squares)
    for each in (values, errors):
        np.copyto(each, np.nan, where=visits == 0)
    return Sums(visits, values.T, errors.T, fourths.T)


def read_values(run: Run) -> dict[str, Valued]:
    """The examples of a run, in their order, for every validation set.

    Raises:
      UsageError: as ``sum_visits``.
    """
    visits, *sums = sum_visits(run)
    places = mapped_range(len(visits))
    texts = [Column(read, places) for read in (run.ids.take, run.domains.take, run.excerpts)]
    return {
        name: Valued(*texts, visits, *(each[:, k] for each in sums))
        for k, name in enumerate(run.sets)
    }


def both_ends(ranked: Valued, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the first and of the last ``count``, the last one first; none is in both."""
    first = np.arange(min(count, len(ranked)))
    last = np.arange(max(len(ranked) - count, len(first)), len(ranked))[::-1]
    return first, last


def best_and_worst(measured: np.ndarray, count: int) -> list[tuple[str, np.ndarray]]:
    """Titles and indices of the ``count`` that helped most, and of those that hurt most.

    Where none helped or none hurt, the title says so and the list has what comes nearest to it.

    Args:
      measured: Values or values per visit, the most helpful first.

    >>> best_and_worst(np.array([3.0, 2.0, -1.0]), 1)
    [('Most helpful', array([0])), ('Most harmful', array([2]))]
    """
    everything = np.arange(len(measured))
    helped = np.flatnonzero(measured > 0)[:count]
    hurt = np.flatnonzero(measured < 0)[::-1][:count]
    lists = [("Most helpful", helped), ("Most harmful", hurt)]
    if not len(helped):
        nearest = np.setdiff1d(everything, hurt)[:count]
        lists[0] = ("Least harmful, as none helped", nearest)
    if not len(hurt):
        nearest = np.setdiff1d(everything, lists[0][1])[::-1][:count]
        lists[1] = ("Least helpful, as none hurt", nearest)
    return [(title, indices) for title, indices in lists if len(indices)]
