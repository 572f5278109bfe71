"""Statistics of ranks and of measurements with few degrees of freedom."""

import warnings

import numpy as np
from scipy import stats

LEVEL = 0.05  # of false claims, where nothing differs


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 up, the smallest value first; tied values share their mean rank.

    >>> ranks(np.array([5.0, 1.0, 5.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, inverse, ties = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(ties) - (ties - 1) / 2)[inverse]


def roc_auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The probability that a positive is above a negative, ties counting half.

    ``(sum of the positives' ranks - P (P + 1) / 2) / (P Q)`` for P positives and Q negatives, tied
    values sharing their mean rank.

    >>> roc_auc(np.array([3.0, 1.0]), np.array([2.0, 1.0]))
    0.625
    """
    count = len(positives)
    above = ranks(np.concatenate([positives, negatives]))[:count].sum() - count * (count + 1) / 2
    return float(above / (count * len(negatives)))


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation; NaN where one of them is constant or there are fewer than two values.

    >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])), 3)
    0.982
    """
    if len(first) < 2:
        return float("nan")
    first, second = (values - np.mean(values) for values in (first, second))
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / size) if size > 0 else float("nan")


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN as ``pearson``.

    >>> round(spearman(np.array([1.0, 10.0, 100.0]), np.array([0.1, 0.2, 7.0])), 3)
    1.0
    """
    return pearson(ranks(first), ranks(second))


def correlation_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The 95% interval of ``spearman``, by the bootstrap over pairs (percentiles, 9999 draws).

    NaN where one of them is constant. Draws in which one is constant are passed over.

    >>> low, high = correlation_interval(np.arange(9.0), np.arange(9.0) ** 2)
    >>> round(low, 3), round(high, 3)
    (1.0, 1.0)
    """
    if np.isnan(spearman(first, second)):
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of draws passed over
        found = stats.bootstrap(
            (first, second), spearman, paired=True, vectorized=False, method="percentile", rng=0
        )
    low, high = np.nanquantile(found.bootstrap_distribution, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def reliability(values: np.ndarray, errors: np.ndarray) -> float:
    """The part of the values' variance that is not that of their errors, from 0 to 1.

        max(0, 1 - mean(errors^2) / variance(values))

    Two measurements of one quantity correlate at about the root of the product of theirs. NaN where
    the values do not differ.

    >>> reliability(np.array([1.0, -1.0]), np.array([0.5, 0.5]))
    0.75
    """
    variance = np.var(values) if len(values) else 0.0
    if not variance > 0:
        return float("nan")
    return float(max(0.0, 1 - np.mean(errors**2) / variance))


def freedom(squares: np.ndarray, fourths: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Degrees of freedom of standard errors that are sums of squares of one degree each.

        freedom = min(count, 2 squares^2 / fourths - 1)

    for squares ``sum_i error[i]^2`` and fourths ``sum_i error[i]^4`` over count measurements: their
    number if all have errors of one size, fewer if a few of them dominate. At least 1.

    >>> freedom(np.array([4.0, 4.0]), np.array([4.0, 16.0]), np.array([4, 4])).tolist()
    [4.0, 1.0]

    Source: Satterthwaite, doi:10.2307/3002019, has ``squares^2 / fourths``. That is too small on
    average, as a fourth power is three times the squared variance it estimates. With ``3 ... - 2``
    the bias would be none for errors of one size, with 2 and 1 claims hold their level best where
    sizes fall off by ten and more.
    """
    ratio = squares**2 / np.where(fourths > 0, fourths, np.inf)
    found = np.where(fourths > 0, 2 * ratio - 1, count)
    return np.maximum(np.minimum(found, count), 1.0)


def differs(values: np.ndarray, errors: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Which values differ from zero by Student's t test, at ``LEVEL`` and from both sides.

    >>> two_errors = np.array([2.0, 2.0])
    >>> differs(two_errors, np.ones(2), np.array([8.0, 1000.0])).tolist()
    [False, True]
    """
    return np.abs(values) > stats.t.ppf(1 - LEVEL / 2, degrees) * errors


def without_sum(sums: np.ndarray, sizes: np.ndarray) -> float:
    """The share of the steps with scores whose sum is zero, within rounding.

    Args:
      sums, sizes: [steps], of the scores of each and of their absolute values.

    >>> without_sum(np.array([0.0, 0.9, 0.0]), np.array([1.0, 0.9, 0.0]))
    0.5
    """
    sums, sizes = np.abs(sums[sizes > 0]), sizes[sizes > 0]
    return float(np.mean(sums < 1e-4 * sizes)) if len(sums) else 0.0
