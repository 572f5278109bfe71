"""The training examples of a run with their values, and their order."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.run import Run

By = Literal["value", "mean"]


@dataclasses.dataclass(frozen=True)
class Valued:
    """Training examples with their values for one validation set; columns of one length, n.

    Attributes:
      ids, domains, excerpts: [n], texts.
      visits: int64 [n].
      values, errors: float64 [n], the values and their standard errors.
    """

    ids: np.ndarray
    domains: np.ndarray
    excerpts: np.ndarray
    visits: np.ndarray
    values: np.ndarray
    errors: np.ndarray

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

    def ranked(self, by: By = "value") -> "Valued":
        """The examples that were visited, the most helpful first; ties in their old order."""
        visited = self.select(self.visits > 0)
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


def sum_visits(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The value of every training example so far.

    Returns:
      ``visits`` int64 [n], ``values`` float64 [n, K] and ``errors`` float64 [n, K] in the order
      of ``run.examples`` and ``run.sets``. A value is the sum of the scores of the example's
      visits, its error the root of their summed squared errors.

    Raises:
      UsageError: the log holds no steps yet, or as ``visited_examples``.
    """
    if not run.end:
        raise UsageError(f"{run.path}: no steps in the log yet, so there are no values")
    indices, count = visited_examples(run), len(run.examples)
    values, errors = np.zeros((2, count, len(run.sets)))
    for k, name in enumerate(run.sets):
        values[:, k] = np.bincount(indices, run.numbers("scores", f"score_{name}"), count)
        squares = run.numbers("scores", f"error_{name}") ** 2
        errors[:, k] = np.sqrt(np.bincount(indices, squares, count))
    return np.bincount(indices, minlength=count), values, errors


def read_values(run: Run) -> dict[str, Valued]:
    """The examples of a run, in the order of ``run.examples``, for every validation set.

    Raises:
      UsageError: as ``sum_visits``.
    """
    visits, values, errors = sum_visits(run)
    texts = [
        np.array(run.examples[name].to_pylist(), object) for name in ("id", "domain", "excerpt")
    ]
    return {
        name: Valued(*texts, visits, values[:, k], errors[:, k]) for k, name in enumerate(run.sets)
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
