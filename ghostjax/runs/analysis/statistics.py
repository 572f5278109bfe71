"""Statistics of ranks, in NumPy."""

import numpy as np


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
