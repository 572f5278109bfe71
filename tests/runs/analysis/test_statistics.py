import numpy as np
import pytest

from ghostjax.runs.analysis.statistics import (
    differs,
    freedom,
    pearson,
    ranks,
    reliability,
    roc_auc,
    spearman,
)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([1, 3], [2, 0], 0.75),  # of four pairs, 1 < 2 alone is wrong
        ([1, 2], [1], 0.75),  # one tie, one right
        ([5], [1, 5, 5, 7], 0.5),  # one right, two ties, one wrong
    ],
)
def test_roc_auc_by_hand(positives, negatives, expected):
    found = roc_auc(np.array(positives, float), np.array(negatives, float))
    assert found == pytest.approx(expected)


def test_roc_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 30).astype(float), rng.integers(0, 7, 20).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    assert roc_auc(high, low) == pytest.approx(np.mean(pairs))


def test_ranks_by_counting():
    values = np.random.default_rng(1).integers(0, 5, 40).astype(float)
    expected = [(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values]
    np.testing.assert_allclose(ranks(values), expected)


def test_spearman_by_the_formula_without_ties():
    rng = np.random.default_rng(2)
    first, second = rng.permutation(20).astype(float), rng.permutation(20).astype(float)
    expected = 1 - 6 * ((first - second) ** 2).sum() / (20 * (20**2 - 1))
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(first, np.exp(first)) == pytest.approx(1)
    assert spearman(first, -(first**3)) == pytest.approx(-1)


def test_spearman_with_ties_is_pearson_of_the_mean_ranks():
    found = spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])


def test_pearson_agrees_with_numpy():
    first, second = np.random.default_rng(3).normal(size=(2, 30))
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0]])
def test_correlation_of_what_does_not_vary_is_undefined(values):
    assert np.isnan(pearson(np.array(values), np.array(values)))
    assert np.isnan(spearman(np.array(values), np.array(values)))


def test_reliability_tells_how_two_noisy_measurements_correlate():
    rng = np.random.default_rng(4)
    truth = rng.normal(size=20000)
    first, second = truth + 0.5 * rng.normal(size=(2, 20000))
    expected = np.sqrt(
        reliability(first, np.full(20000, 0.5)) * reliability(second, np.full(20000, 0.5))
    )
    assert pearson(first, second) == pytest.approx(expected, abs=0.02)
    assert reliability(truth, 9 + 0 * truth) == 0
    assert np.isnan(reliability(np.ones(3), np.ones(3)))
    assert np.isnan(reliability(np.ones(0), np.ones(0)))


FALLING = {
    "equal": np.ones(64),
    "to a tenth": np.linspace(1, 0.1, 64),
    "by half every eighth": 0.5 ** (np.arange(64) / 8),
    "at random": np.exp(np.random.default_rng(5).normal(size=64) / 2),
}


@pytest.mark.parametrize("sizes", FALLING.values(), ids=FALLING)
@pytest.mark.parametrize("visits", [8, 16, 64])
def test_claims_of_an_effect_hold_their_level(sizes, visits):
    """Values of examples without effect, from two halves per visit; the errors' sizes differ."""
    rng, examples = np.random.default_rng(visits), 20000
    sizes = sizes[:: 64 // visits]
    halves = rng.normal(size=(examples, visits, 2)) * sizes[:, None]
    values = halves.mean(-1).sum(-1)
    squares = (halves[..., 0] - halves[..., 1]) ** 2 / 4
    errors = np.sqrt(squares.sum(-1))
    degrees = freedom(squares.sum(-1), (squares**2).sum(-1), np.full(examples, visits))
    assert differs(values, errors, degrees).mean() == pytest.approx(0.05, abs=0.02)
    # What used to be said: with few visits far too often.
    if visits == 8:
        assert (np.abs(values) > 2 * errors).mean() > 0.075


def test_degrees_of_freedom_by_hand():
    squares, fourths = np.array([3.0, 3.0, 0.0]), np.array([3.0, 9.0, 0.0])
    assert freedom(squares, fourths, np.array([3, 3, 2])).tolist() == [3, 1, 2]
    assert differs(np.array([0.0, 1.0]), np.zeros(2), np.full(2, 8)).tolist() == [False, True]
