"""What the log has of every visit, whatever the validation set: losses and norms of gradients."""

from typing import NamedTuple

import numpy as np

from ghostjax.runs.analysis.values import visited_examples
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
    """A column of ``run.scores``, in the order of ``run.examples``.

    Raises:
      UsageError: as ``visited_examples``.
    """
    indices, count = visited_examples(run), len(run.examples)
    numbers = run.numbers("scores", column)
    known = np.isfinite(numbers)
    indices, numbers = indices[known], numbers[known]
    visits = np.bincount(indices, minlength=count)
    first, last = np.full((2, count), np.nan)
    # The log is in the order of steps. Of several assignments to one place, the last one stays.
    last[indices] = numbers
    first[indices[::-1]] = numbers[::-1]
    sums = np.bincount(indices, numbers, count)
    return Visits(np.where(visits > 0, sums / np.maximum(visits, 1), np.nan), first, last)
