"""Steps whose prediction is far off, and what their scores count."""

from typing import Any

import numpy as np


def step_weights(predicted: Any, actual: Any) -> np.ndarray:
    """What the scores of each step count when they are summed over steps.

        weight = min(1, (|actual| + 2 typical) / |predicted|),      typical = median(|actual|)

    A step counts in full unless its update was predicted to do much more to the validation loss
    than it did. Then all its scores are scaled alike, so that they add up to no more than the
    actual decrease and twice the typical one: one validation row in a place of high curvature
    cannot outweigh the rest of a run.

    Args:
      predicted, actual: [steps], decreases of the validation loss, NaN where a step was not scored.

    Returns:
      float64 [steps], 1 where a decrease is not finite.

    >>> step_weights([0.1, 0.1, -6.7], [0.1, 0.1, 0.0]).round(3).tolist()
    [1.0, 1.0, 0.03]
    """
    predicted, actual, typical = _sizes(predicted, actual)
    most = np.abs(actual) + 2 * typical
    size = np.abs(predicted)
    with np.errstate(invalid="ignore"):
        return np.where(size > most, most / np.where(size > 0, size, 1), 1.0)


def far_off(predicted: Any, actual: Any) -> np.ndarray:
    """Which steps did something else to the validation loss than was predicted.

        |predicted - actual| > |actual| / 2 + 2 median(|actual|)

    Args:
      predicted, actual: as for ``step_weights``.

    Returns:
      bool [steps]; False where a decrease is not finite.

    >>> far_off([0.1, 0.2, -6.7], [0.1, 0.1, 0.0]).tolist()
    [False, False, True]
    """
    predicted, actual, typical = _sizes(predicted, actual)
    with np.errstate(invalid="ignore"):
        return np.abs(predicted - actual) > np.abs(actual) / 2 + 2 * typical


def _sizes(predicted: Any, actual: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Both as float64, NaN where either is not finite, and the typical size of ``actual``."""
    predicted, actual = (np.asarray(each, np.float64) for each in (predicted, actual))
    is_known = np.isfinite(predicted) & np.isfinite(actual)
    known = np.abs(actual[is_known])
    typical = float(np.median(known)) if len(known) else 0.0
    return np.where(is_known, predicted, np.nan), np.where(is_known, actual, np.nan), typical
