"""What a run measures of itself, against NumPy and against errors made on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import fidelity
from models.arrays import mean_squares
from tests.dots.checks import DENSE, X, dense


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


def test_predicted_decrease_is_that_of_a_small_step():
    grads = jax.grad(loss_fn)(DENSE, X)
    updates = jax.tree.map(lambda leaf: -1e-3 * leaf, grads)
    after = jax.tree.map(jnp.add, DENSE, updates)
    actual = loss_fn(DENSE, X) - loss_fn(after, X)
    np.testing.assert_allclose(fidelity.predicted_decrease(grads, updates), actual, rtol=0.05)


GOOD = fidelity.Fidelity(
    prediction_correlation=0.9,
    prediction_error=0.2,
    prediction_ratio=0.9,
    plain_correlation=0.3,
    sampling_error=0.5,
    conservation_error=1e-5,
    audit_error=None,
    steps=30,
)
BAD = {
    "prediction_correlation": (0.1, "the steps are too large. Lower the learning rate"),
    "prediction_error": (3.0, "typical error 300% of the actual decrease"),
    "sampling_error": (4.0, "4.0 times as large as the differences between examples"),
    "conservation_error": (0.2, "conservation error reached 2.0e-01"),
    "far_off_steps": (2, "In 2 of 30 steps, the validation loss did something far from what was"),
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
    assert (found.undefined_steps, found.steps) == (0, 4)
    assert (found.undefined_examples, found.examples) == (0, 2)


STEPS = {"predicted": [1.0, 2.0, 3.0, -1.0], "actual": [0.9, 2.2, 2.5, -0.9]}
MEASURED = {
    **STEPS,
    "correlations": [0.1, 0.2, 0.3, 0.4],
    "conservation_errors": [0, 1e-6, 3e-6, 2e-6],
    "audit_errors": [np.nan, 1e-6, np.nan, np.nan],
    "values": [1.0, 3.0, 7.0],
    "value_errors": [0.3, 0.4, 0.2],
}


def summarized(**changes):
    return fidelity.summarize(**{k: np.array(v) for k, v in (MEASURED | changes).items()})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["predicted", "actual", "conservation_errors"])
def test_a_step_that_is_not_finite_is_told_and_left_out(field, bad):
    with_bad = summarized(**{field: [*MEASURED[field][:2], bad, MEASURED[field][3]]})
    if field in STEPS:  # the largest conservation error is that of this very step
        less = {name: np.delete(MEASURED[name], 2) for name in STEPS}
        without = summarized(**less, conservation_errors=[0, 1e-6, 3e-6])
    else:
        without = summarized(conservation_errors=[0, 1e-6, 0, 2e-6])
    counts = {"undefined_steps": 1, "steps": 4}
    assert with_bad == dataclasses.replace(without, **counts)
    assert with_bad.conservation_error == (3e-6 if field in STEPS else 2e-6)
    (sentence,) = with_bad.warnings()
    assert sentence.startswith("Of 4 steps, 1 had a predicted or actual decrease or a conservation")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["values", "value_errors"])
def test_an_example_that_is_not_finite_is_told_and_left_out(field, bad):
    with_bad = summarized(**{field: [*MEASURED[field][:2], bad]})
    without = summarized(values=[1.0, 3.0], value_errors=[0.3, 0.4])
    assert with_bad == dataclasses.replace(without, undefined_examples=1, examples=3)
    assert with_bad.sampling_error == pytest.approx(np.sqrt(0.125))
    (sentence,) = with_bad.warnings()
    assert sentence.startswith("Of 3 examples, 1 have a value or standard error that is not")


def test_steps_are_counted_once():
    nan = np.nan
    found = summarized(
        predicted=[nan, 2.0, 3.0, nan],
        actual=[nan, 2.5, nan, -0.5],
        conservation_errors=[nan, 1e-6, 3e-6, 2e-6],
    )
    assert (found.undefined_steps, found.conservation_error) == (3, 3e-6)
    assert found.prediction_ratio == pytest.approx(1.25)


def test_nothing_finite_leaves_no_figure():
    nothing = dict.fromkeys(MEASURED, [np.nan] * 3)
    found = summarized(**nothing)
    assert (found.undefined_steps, found.undefined_examples, found.audit_error) == (3, 3, None)
    figures = dataclasses.asdict(found)
    assert all(
        np.isnan(figure)
        for name, figure in figures.items()
        if name.endswith(("_correlation", "_ratio", "_error")) and name != "audit_error"
    )
    assert "Of 3 steps, 3 had" in found.warnings()[0]
    empty = summarized(values=[], value_errors=[])
    assert np.isnan(empty.sampling_error)
    assert not empty.warnings()


def test_an_audit_that_failed_is_no_missing_one():
    found = summarized(audit_errors=[np.nan, np.inf, 1e-6, np.nan])
    assert found.audit_error == np.inf
    assert "audit error" in found.warnings()[0]


def test_sizes_of_float32_do_not_overflow():
    found = summarized(values=np.float32([3e38, -3e38, 0]), value_errors=np.float32([1e38] * 3))
    assert found.sampling_error == pytest.approx(1 / np.sqrt(6))


def test_one_step_that_is_far_off_is_not_taken_for_steps_too_large():
    rng = np.random.default_rng(0)
    actual = rng.normal(0.1, 0.02, 40)
    predicted = actual + rng.normal(0, 0.002, 40)
    others = {name: np.zeros(40) for name in ("correlations", "conservation_errors")}

    def found(predicted):
        return summarized(predicted=predicted, actual=actual, audit_errors=[np.nan], **others)

    one = predicted.copy()
    one[7] = -6.7
    assert fidelity.far_off(one, actual).tolist() == [n == 7 for n in range(40)]
    assert (found(predicted).far_off_steps, found(one).far_off_steps) == (0, 1)
    assert found(one).prediction_correlation > 0.9
    (sentence,) = found(one).warnings()
    assert "In 1 of 40 steps" in sentence
    many = np.where(np.arange(40) % 4, predicted, -6.7)
    assert found(many).far_off_steps == 10
    assert "the steps are too large" in found(many).warnings()[0]


def test_weights_of_steps():
    actual = np.array([0.1, -0.1, 0.3, 0.0, np.nan])
    predicted = np.array([0.2, 0.4, -0.3, -6.0, 1.0])
    # The typical size is 0.1.
    expected = [1, 0.3 / 0.4, 1, 0.2 / 6, 1]
    np.testing.assert_allclose(fidelity.step_weights(predicted, actual), expected)
    assert fidelity.step_weights([0.0], [0.0]).tolist() == [1]
    assert fidelity.step_weights([], []).tolist() == []
