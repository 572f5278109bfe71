"""The training examples of a run with their values, and their order.

Values are computed here alone, in ``sum_visits``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ghostjax.fidelity import step_weights
from ghostjax.runs.analysis.statistics import differs, freedom
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.run import Run

By = Literal["value", "mean"]
Verdict = Literal["helps", "hurts", "unclear", "few visits", "no error bar", "not visited"]

MIN_VISITS = 8  # an error from fewer tells too little to claim anything
VERDICTS = (
    "helps and hurts: the value differs from zero by a t test at 5%, so that of examples without "
    f"any effect, one in twenty is among them; unclear: it does not; few visits: less than "
    f"{MIN_VISITS}, too few to tell; no error bar: the scores have no standard errors; not "
    "visited: there is no value"
)


@dataclasses.dataclass(frozen=True)
class Valued:
    """Training examples with their values for one validation set; columns of one length, n.

    Attributes:
      ids, domains, excerpts: [n], texts.
      visits: int64 [n], how many of their visits were scored.
      values, errors: float64 [n], the values and their standard errors; NaN without a visit, and
        the errors also where those of the scores were not measured.
      fourths: float64 [n], the summed fourth powers of the visits' errors.
    """

    ids: np.ndarray
    domains: np.ndarray
    excerpts: np.ndarray
    visits: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    fourths: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, which: np.ndarray) -> "Valued":
        """The examples of a mask or of indices."""
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
        degrees = freedom(self.errors**2, self.fourths, self.visits)
        return self.is_told & differs(self.values, self.errors, degrees)

    @property
    def verdicts(self) -> np.ndarray:
        """[n], of type ``Verdict``: what can be said of each example."""
        told = np.where(self.values > 0, "helps", "hurts")
        found = np.where(self.apart, told, np.where(self.is_told, "unclear", "few visits"))
        found = np.where(self.has_error, found, "no error bar")
        return np.where(self.visited, found, "not visited").astype(object)

    def ranked(self, by: By = "value") -> "Valued":
        """The examples that were visited, the most helpful first; ties in their old order."""
        visited = self.select(self.visited)
        # NaN goes last.
        return visited.select(np.argsort(-visited.measured(by)[0], kind="stable"))


def find(ids: Sequence[str], among: Sequence[str]) -> np.ndarray:
    """Where each id is in ``among``, which has every id once; -1 for those it has not.

    >>> find(["b", "x", "b"], ["a", "b"]).tolist()
    [1, -1, 1]
    """
    ids, among = (pa.array(each, pa.string()) for each in (ids, among))
    return pc.index_in(ids, value_set=among).fill_null(-1).to_numpy()


def visited_examples(run: Run) -> np.ndarray:
    """Which of ``run.examples`` each of ``run.scores`` is of.

    Raises:
      UsageError: an id is there twice, or the log has one that is not one of an example.
    """
    ids, visits = (table["id"].combine_chunks() for table in (run.examples, run.scores))
    if len(ids.unique()) < len(ids):
        raise UsageError(f"{run.path / 'examples.parquet'}: an id is there twice")
    found = find(visits, ids)
    if (found < 0).any():
        unknown = visits[int(np.argmin(found))].as_py()
        raise UsageError(
            f"{run.path}: the log has id {unknown!r}, which is not in examples.parquet"
        )
    return found


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


def scored_steps(run: Run) -> np.ndarray:
    """Which steps were scored, [steps] bool."""
    scored = np.isfinite(run.numbers("scores", f"score_{run.sets[0]}"))
    return np.bincount(run.scores["step"].to_numpy()[scored], minlength=run.end) > 0


def measured(run: Run, column: str) -> np.ndarray | None:
    """A column of the scored steps; None where no step has it, as the loop did not measure it."""
    found = run.numbers("steps", column)[scored_steps(run)]
    return None if np.isnan(found).all() else found


def visit_weights(run: Run, name: str) -> np.ndarray:
    """What each of ``run.scores`` counts for a validation set: the weight of its step.

    See ``fidelity.step_weights``.
    """
    decreases = (run.numbers("steps", f"{which}_{name}") for which in ("predicted", "actual"))
    return step_weights(*decreases)[run.scores["step"].to_numpy()]


def sum_visits(run: Run) -> Sums:
    """The values so far, in the order of ``run.examples`` and ``run.sets``.

        value = sum over visits of weight[step] * score
        error = sqrt( sum over visits of (weight[step] * error)^2 )

    Raises:
      UsageError: the log holds no steps yet, or as ``visited_examples``.
    """
    if not run.end:
        raise UsageError(f"{run.path}: no steps in the log yet, so there are no values")
    indices, count = visited_examples(run), len(run.examples)
    values, errors, fourths = np.zeros((3, count, len(run.sets)))
    scored = np.isfinite(run.numbers("scores", f"score_{run.sets[0]}"))
    visits = np.bincount(indices[scored], minlength=count)
    for k, name in enumerate(run.sets):
        weights = visit_weights(run, name)
        scores, own = (
            (weights * run.numbers("scores", f"{what}_{name}"))[scored]
            for what in ("score", "error")
        )
        values[:, k], squares, fourths[:, k] = (
            np.bincount(indices[scored], each, count) for each in (scores, own**2, own**4)
        )
        errors[:, k] = np.sqrt(squares)
    values[visits == 0] = errors[visits == 0] = np.nan
    return Sums(visits, values, errors, fourths)


def read_values(run: Run) -> dict[str, Valued]:
    """The examples of a run, in the order of ``run.examples``, for every validation set.

    Raises:
      UsageError: as ``sum_visits``.
    """
    visits, *sums = sum_visits(run)
    texts = [
        np.array(run.examples[name].to_pylist(), object) for name in ("id", "domain", "excerpt")
    ]
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
