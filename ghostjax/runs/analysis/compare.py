"""Two runs' values of the same examples, and how far they differ by more than their errors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ghostjax.runs.analysis.statistics import differs, freedom, ranks, reliability, spearman
from ghostjax.runs.analysis.values import By, Valued
from ghostjax.runs.store.run import find


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The examples that both runs visited, for one validation set; columns of one length, m.

    Attributes:
      a, b: The examples of either run, matched by id.
      value_a, value_b, error_a, error_b: [m], values (or values per visit) and standard errors.
      rank_a, rank_b: [m], ranks among these m examples, 1 for the most helpful.
      only_a, only_b: Examples that only this run visited, or only this run has.
      missing_a, missing_b: Of each of ``only_b`` and ``only_a``, why it is not in the other run:
        "not visited" or "absent".
      unvisited: Ids of examples that are in both runs and that neither visited.
    """

    a: Valued
    b: Valued
    value_a: np.ndarray
    value_b: np.ndarray
    error_a: np.ndarray
    error_b: np.ndarray
    rank_a: np.ndarray
    rank_b: np.ndarray
    only_a: Valued
    only_b: Valued
    missing_a: np.ndarray
    missing_b: np.ndarray
    unvisited: Sequence[str]

    @property
    def change(self) -> np.ndarray:
        """[m], the value in B minus that in A."""
        return self.value_b - self.value_a

    @property
    def error(self) -> np.ndarray:
        """[m], the standard error of the change."""
        return np.hypot(self.error_a, self.error_b)

    @property
    def beyond(self) -> np.ndarray:
        """[m] bool: the change differs from zero by the t test of ``Valued.apart``."""
        told = np.flatnonzero(self.is_told)  # often few, and quantiles of Student's t take long

        def fourths(own: Valued, each: np.ndarray) -> np.ndarray:
            # Per visit, errors are smaller by one factor, and their fourth powers by its fourth.
            errors = own.errors[told]
            return own.fourths[told] * (each[told] / np.where(errors > 0, errors, 1)) ** 4

        change, error = self.change[told], self.error[told]
        both = fourths(self.a, self.error_a) + fourths(self.b, self.error_b)
        degrees = freedom(error**2, both, self.a.visits[told] + self.b.visits[told])
        found = np.zeros(len(self.a), bool)
        found[told] = differs(change, error, degrees)
        return found

    @property
    def is_told(self) -> np.ndarray:
        """[m] bool: both runs have visits enough to claim something."""
        return self.a.is_told & self.b.is_told

    @property
    def sign_changed(self) -> np.ndarray:
        """[m] bool: helped in one run and hurt in the other."""
        return np.sign(self.value_a) * np.sign(self.value_b) < 0

    @property
    def rank_changed(self) -> np.ndarray:
        """[m] bool: another rank."""
        return self.rank_a != self.rank_b

    def largest(self) -> np.ndarray:
        """Indices by the size of the change in standard errors, the largest first."""
        has_error = np.isfinite(self.error)
        error = np.where(self.error > 0, self.error, np.finfo(float).tiny)
        # Without an error the size of the change is all there is; they come last.
        error = np.where(has_error, error, 1.0)
        # Beyond the range of a double is as large as it gets.
        with np.errstate(over="ignore"):
            sizes = -np.abs(self.change) / error
        return np.lexsort((sizes, ~has_error))

    def summary(self) -> dict[str, Any]:
        """The figures of the comparison.

        ``correlation`` is Spearman's. ``expected_correlation`` is about what two measurements with
        these errors of the same values would have: the root of the product of their reliabilities.
        """
        moved = np.abs(self.rank_b - self.rank_a)
        kept = reliability(self.value_a, self.error_a) * reliability(self.value_b, self.error_b)
        return {
            "compared": len(self.a),
            "only_a": len(self.only_a),
            "only_b": len(self.only_b),
            "correlation": spearman(self.value_a, self.value_b),
            "expected_correlation": float(np.sqrt(kept)),
            "unvisited": len(self.unvisited),
            "told": int(self.is_told.sum()),
            "changed_beyond_errors": int(self.beyond.sum()),
            "sign_changed": int(self.sign_changed.sum()),
            "sign_changed_beyond_errors": int((self.sign_changed & self.beyond).sum()),
            "rank_changed": int(self.rank_changed.sum()),
            "rank_changed_beyond_errors": int((self.rank_changed & self.beyond).sum()),
            "median_rank_change": float(np.median(moved)) if len(moved) else float("nan"),
        }


def compare(a: Valued, b: Valued, by: By = "value") -> Comparison:
    """Matches the examples of two runs by id, and compares those that both visited."""
    place = find(a.ids, b.ids)
    # A place of -1 is that of the zero at the end.
    in_a = np.flatnonzero((a.visits > 0) & (np.append(b.visits, 0)[place] > 0))
    in_b = place[in_a]
    both_a, both_b = a.select(in_a), b.select(in_b)
    value_a, error_a = both_a.measured(by)
    value_b, error_b = both_b.measured(by)
    only_a, only_b = _rest(a, in_a), _rest(b, in_b)
    return Comparison(
        a=both_a,
        b=both_b,
        value_a=value_a,
        value_b=value_b,
        error_a=error_a,
        error_b=error_b,
        rank_a=ranks(-value_a),
        rank_b=ranks(-value_b),
        only_a=only_a,
        only_b=only_b,
        missing_a=_missing(only_b, a),
        missing_b=_missing(only_a, b),
        unvisited=a.ids[~a.visited & (place >= 0) & ~np.append(b.visited, True)[place]],
    )


def _missing(alone: Valued, other: Valued) -> np.ndarray:
    is_there = find(alone.ids, other.ids) >= 0
    return np.array(["absent", "not visited"], object)[is_there.astype(int)]


def _rest(valued: Valued, matched: np.ndarray) -> Valued:
    """The examples that were visited and not matched."""
    rest = valued.visited.copy()
    rest[matched] = False
    return valued.select(rest)


def differing_fingerprints(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of the fingerprints of two ``run.json`` that differ, or are in one of them alone.

    >>> differing_fingerprints({"fingerprints": {"data": "a"}}, {"fingerprints": {"data": "b"}})
    ['data']
    """
    found = [metadata.get("fingerprints") for metadata in (first, second)]
    one, other = (marks if isinstance(marks, dict) else {} for marks in found)
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]
