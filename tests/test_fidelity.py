"""What a run measures of itself, against NumPy and against errors made on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import fidelity, value_grad_and_dots
from tests.dots.checks import DENSE, X, dense, direction_like, mean_squares


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_correlation_is_that_of_numpy():
    first, second = draw(2, 3, 20)
    found = fidelity.correlation(jnp.asarray(first), jnp.asarray(second))
    expected = [np.corrcoef(*pair)[0, 1] for pair in zip(first, second)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Scores of Adam's first step are tiny.
    small = fidelity.correlation(jnp.asarray(first * 1e-30), jnp.asarray(second))
    np.testing.assert_allclose(small, expected, rtol=1e-5)
    assert np.isnan(fidelity.correlation(jnp.ones(4), jnp.arange(4.0)))


def test_standard_error_is_that_of_the_mean():
    parts = draw(5, 7)
    expected = parts.std(axis=0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(fidelity.standard_error(jnp.asarray(parts)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 parts"):
        fidelity.standard_error(jnp.ones((1, 3)))


def loss_fn(params, x):
    return jnp.mean(mean_squares(dense(params, x)))


def test_an_audit_finds_a_row_that_is_wrong():
    direction = direction_like(DENSE)
    dots = value_grad_and_dots(loss_fn)(DENSE, X, direction=direction).total()
    audit = jax.jit(
        lambda dots, rows: fidelity.audit(
            loss_fn, DENSE, X, direction=direction, dots=dots, rows=rows
        )
    )
    assert audit(dots, jnp.array([0, 3])) < 1e-5
    wrong = dots.at[3].add(0.1 * jnp.abs(dots).max())
    assert audit(wrong, jnp.array([0, 3])) > 0.05
    assert audit(wrong, jnp.array([0, 1])) < 1e-5


def test_predicted_decrease_is_that_of_a_small_step():
    grads = jax.grad(loss_fn)(DENSE, X)
    updates = jax.tree.map(lambda leaf: -1e-3 * leaf, grads)
    after = jax.tree.map(jnp.add, DENSE, updates)
    actual = loss_fn(DENSE, X) - loss_fn(after, X)
    np.testing.assert_allclose(fidelity.predicted_decrease(grads, updates), actual, rtol=0.05)


def test_an_audit_of_what_is_not_finite_fails():
    """NaN would be below every tolerance."""
    x = jnp.array([[1.0, 0.0], [jnp.inf, 2.0]])
    error = fidelity.audit(
        lambda w, x: jnp.mean((x @ w) ** 2),
        jnp.ones(2),
        x,
        direction=jnp.ones(2),
        dots=jnp.array([4.0, 36.0]),
        rows=jnp.array([1]),
    )
    assert error == np.inf


GOOD = fidelity.Fidelity(
    prediction_correlation=0.9,
    prediction_error=0.2,
    prediction_ratio=0.9,
    plain_correlation=0.3,
    sampling_error=0.5,
    conservation_error=1e-5,
    audit_error=None,
)
BAD = {
    "prediction_correlation": (0.1, "the steps are too large. Lower the learning rate"),
    "prediction_error": (3.0, "typical error 300% of the actual decrease"),
    "sampling_error": (4.0, "4.0 times as large as the differences between examples"),
    "conservation_error": (0.2, "conservation error reached 2.0e-01"),
    "audit_error": (0.9, "redone by plain autodiff came out differently: the audit error"),
}


def test_good_scores_have_no_warnings():
    assert GOOD.warnings() == []
    nothing = dataclasses.replace(
        GOOD, prediction_correlation=np.nan, prediction_error=np.nan, sampling_error=np.nan
    )
    assert nothing.warnings() == []


@pytest.mark.parametrize(("name", "case"), BAD.items(), ids=BAD)
def test_every_warning_has_its_reason(name, case):
    value, message = case
    (sentence,) = dataclasses.replace(GOOD, **{name: value}).warnings()
    assert message in sentence
    broken = dataclasses.replace(GOOD, conservation_error=np.nan)
    assert "conservation error" in broken.warnings()[0]


def test_a_run_summed_up():
    predicted, actual = np.array([1.0, 2.0, 3.0, -1.0]), np.array([0.5, 2.5, 2.0, -0.5])
    found = fidelity.summarize(
        predicted=predicted,
        actual=actual,
        correlations=np.array([0.1, np.nan, 0.3, 0.5]),
        conservation_errors=np.array([0, 1e-6, 3e-6, 0]),
        audit_errors=np.array([1e-6, np.nan, 2e-6, np.nan]),
        values=np.array([1.0, 3.0]),
        value_errors=np.array([0.3, 0.4]),
    )
    assert found.prediction_correlation == pytest.approx(np.corrcoef(predicted, actual)[0, 1])
    assert found.prediction_ratio == pytest.approx(4.5 / 5)
    assert found.prediction_error == pytest.approx(0.5 / 1.25)
    assert found.plain_correlation == pytest.approx(0.3)
    assert found.sampling_error == pytest.approx(np.sqrt(0.125))
    assert (found.conservation_error, found.audit_error) == (3e-6, 2e-6)
