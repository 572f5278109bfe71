"""The training examples of a run with their values, and their order."""

import dataclasses
from typing import Literal

import numpy as np

from ghostjax.runs.config import UsageError
from ghostjax.runs.reading import Run

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

    def by_domain(self) -> dict[str, "Valued"]:
        """The examples of each domain, in the order of the domains' names."""
        if not len(self):
            return {}
        names, place, counts = np.unique(
            self.domains.astype(str), return_inverse=True, return_counts=True
        )
        groups = np.split(np.argsort(place, kind="stable"), np.cumsum(counts)[:-1])
        return {str(name): self.select(group) for name, group in zip(names, groups)}


def read_values(run: Run) -> dict[str, Valued]:
    """The examples of a run, in the order of ``run.examples``, for every validation set.

    Raises:
      UsageError: as ``Run.values``.
    """
    visits, values, errors = run.values()
    texts = [_texts(run, name) for name in ("id", "domain", "excerpt")]
    return {
        name: Valued(*texts, visits, values[:, k], errors[:, k]) for k, name in enumerate(run.sets)
    }


def _texts(run: Run, column: str) -> np.ndarray:
    return np.array(run.examples[column].to_pylist(), object)


def is_finished(run: Run) -> bool:
    """Whether the run is over, so that its values are final."""
    return run.summary is not None and run.summary.get("finished", True) is not False


def unit(run: Run) -> str:
    """The unit of the loss, and so of the values, in words."""
    found = run.metadata.get("unit")
    return found if isinstance(found, str) and found else "the unit of the loss"


def progress_note(run: Run) -> str:
    """One sentence for a run that is not over.

    The number of steps it will have is left out where ``run.json`` does not tell it.
    """
    total = run.metadata.get("options", {}).get("steps")
    of = f" of {total}" if isinstance(total, int) else ""
    return f"The run is not over: these are the values after {run.end}{of} steps."


def check_choice(kind: str, wanted: str | None, choices: list[str]) -> None:
    """Raises ``UsageError`` for a name that is not there; the first twenty that are, are named."""
    if wanted is not None and wanted not in choices:
        more = ", ..." if len(choices) > 20 else ""
        known = ", ".join(choices[:20]) + more
        raise UsageError(f"no {kind} {wanted!r} in the run: expected one of {known}")


def check_count(count: int | None) -> None:
    """Raises ``UsageError`` for a number of examples below one."""
    if count is not None and count < 1:
        raise UsageError(f"--count must be at least 1, got {count}")


def check_formats(csv: bool, json: bool) -> None:
    """Raises ``UsageError`` where both formats are asked for."""
    if csv and json:
        raise UsageError("--csv and --json exclude each other: give one of them")


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
