"""Can the scores be trusted? What a run measures of itself, and what it says in words.

Scores are predictions made from a sample of validation rows. A run can know how good they are: by
what the validation loss really did, by the spread between halves of the validation rows, by the
certificate (``conservation_error``), and by redoing some rows with plain autodiff.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._audit import MAX_AUDIT_ERROR as MAX_AUDIT_ERROR
from ghostjax._audit import MAX_CONSERVATION_ERROR as MAX_CONSERVATION_ERROR
from ghostjax._audit import audit as audit
from ghostjax._audit import inner_product
from ghostjax._predictions import far_off as far_off
from ghostjax._predictions import step_weights as step_weights

MAX_PREDICTION_ERROR = 0.5  # of the actual decrease, in the median step
MIN_PREDICTION_CORRELATION = 0.5
MAX_FAR_OFF = 0.1  # of the steps; fewer are told as single ones
MAX_SAMPLING_ERROR = 1.0  # of the spread of the values
# What a log may lack.
NOT_MEASURED = {
    "errors": "the standard errors of the scores, so that none can be told from zero",
    "predictions": "predicted and actual decrease of the validation loss, so that no step counts "
    "less",
    "certificate": "the conservation error, so that nothing tells whether a part is left out",
}


def predicted_decrease(val_grads: Any, updates: Any) -> jax.Array:
    """The decrease of the validation loss that its gradient predicts for an update.

        - < val_grads, updates >

    Args:
      val_grads: a tree like the parameters. With the gradient at the parameters the prediction is
        right to first order, with that of ``directions.midpoint`` to second.
      updates: what will be added to the parameters, a tree like them.

    Returns:
      float32 scalar, in the unit of the loss. ``actual`` is the loss of the same validation rows
      before the update minus that after it.

    >>> import jax.numpy as jnp
    >>> predicted_decrease(jnp.array([1.0, 2.0]), jnp.array([-0.5, 0.0]))
    Array(0.5, dtype=float32)
    """
    return -inner_product(val_grads, updates)


def correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Pearson correlation over the last axis: of plain with optimizer-aware scores, for instance.

    Args:
      first, second: [..., B], float32.

    Returns:
      One axis less, float32; NaN where one of them is constant.

    >>> import jax.numpy as jnp
    >>> correlation(jnp.array([1.0, 2.0, 3.0]), jnp.array([-1.0, -2.0, -3.0])).round(3)
    Array(-1., dtype=float32)
    """
    first, second = (scores - scores.mean(-1, keepdims=True) for scores in (first, second))
    # Scores can be so small that their squares are zero in float32.
    first, second = (
        scores / jnp.max(jnp.abs(scores), axis=-1, keepdims=True) for scores in (first, second)
    )
    size = jnp.sqrt(jnp.sum(first**2, -1)) * jnp.sqrt(jnp.sum(second**2, -1))
    return jnp.sum(first * second, -1) / size


def standard_error(scores: jax.Array) -> jax.Array:
    """The sampling error of scores that are means over parts of the validation rows.

        error = sqrt( sum_s (scores[s] - mean)^2 / (S (S - 1)) )

    Args:
      scores: [S, ...], with the gradient of each of S >= 2 equal parts of the validation rows; the
        score itself is their mean over S.

    Returns:
      [...], the estimated standard deviation of the score over draws of validation rows.

    Raises:
      ValueError: S is 1.

    >>> import jax.numpy as jnp
    >>> standard_error(jnp.array([[1.0, 5.0], [3.0, 5.0]])).round(3)
    Array([1., 0.], dtype=float32)
    """
    parts = scores.shape[0]
    if parts < 2:
        raise ValueError(
            "a standard error needs scores for at least 2 parts of the validation set."
        )
    return jnp.std(scores, axis=0, ddof=1) / np.sqrt(parts).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The fidelity of a run's scores for one validation set; see ``summarize``.

    Attributes:
      prediction_correlation: Pearson, over the steps, of predicted and actual decrease.
      prediction_error: median of |predicted - actual| over the median of |actual|.
      prediction_ratio: sum of the actual decreases over that of the predicted ones. It and the
        correlation leave out steps that are far off, where these are few.
      plain_correlation: median over the steps of the correlation of the scores with plain dots.
      sampling_error: root mean square of the values' standard errors over the values' spread.
      conservation_error: the largest of any step.
      audit_error: the largest of any audited step, None if there was none.
      missing: what was not measured at all, of ``NOT_MEASURED``; its figures are NaN, that of the
        certificate is None.
      undefined_steps: how many of ``steps`` have a predicted or actual decrease or a conservation
        error that is not finite; the figures leave out what is not.
      undefined_examples: likewise, of ``examples``, for values and their standard errors.
      far_off_steps: how many steps did something else than was predicted; see ``far_off``.
      tolerance: what conservation and audit error may be.
    """

    prediction_correlation: float
    prediction_error: float
    prediction_ratio: float
    plain_correlation: float
    sampling_error: float
    conservation_error: float | None
    audit_error: float | None
    undefined_steps: int = 0
    steps: int = 0
    undefined_examples: int = 0
    examples: int = 0
    far_off_steps: int = 0
    tolerance: float = MAX_CONSERVATION_ERROR
    missing: tuple[str, ...] = ()

    @property
    def is_off_often(self) -> bool:
        """Whether so many steps are far off that it is not for a few rows."""
        return (
            self.prediction_error > MAX_PREDICTION_ERROR
            or self.far_off_steps > MAX_FAR_OFF * self.steps
            or self.prediction_correlation < MIN_PREDICTION_CORRELATION
        )

    def warnings(self) -> list[str]:
        """Plain sentences, one for every reason not to trust the scores."""
        found = []
        if self.missing:
            listed = "; ".join(NOT_MEASURED[name] for name in self.missing)
            found.append(f"Not measured, so the scores are taken on trust: {listed}.")
        if self.undefined_steps:
            found.append(
                f"Of {self.steps} steps, {self.undefined_steps} had a predicted or actual decrease "
                "or a conservation error that is not finite: the figures are of the others."
            )
        if self.undefined_examples:
            found.append(
                f"Of {self.examples} examples, {self.undefined_examples} have a value or standard "
                "error that is not finite: the figures are of the others."
            )
        certificate = self.conservation_error
        if certificate is not None and not certificate <= self.tolerance:
            found.append(
                "The scores do not add up to what the gradient says: the conservation error "
                f"reached {self.conservation_error:.1e}. Numbers may be out of range, or a use of "
                "a parameter is missing."
            )
        if self.audit_error is not None and not self.audit_error <= self.tolerance:
            found.append(
                "Rows that were redone by plain autodiff came out differently: the audit error "
                f"reached {self.audit_error:.1e} of the largest score."
            )
        # NaN, where there is too little to tell, is no reason by itself.
        if self.is_off_often:
            found.append(
                "The validation loss did not do what the scores predict (correlation over the "
                f"steps {self.prediction_correlation:.2f}, typical error "
                f"{self.prediction_error:.0%} of the actual decrease): the steps are too large. "
                "Lower the learning rate or, where the scores are of order 1, take the validation "
                "gradient half-way along the update (--order 2; directions.midpoint)."
            )
        elif self.far_off_steps:
            found.append(
                f"In {self.far_off_steps} of {self.steps} steps, the validation loss did something "
                "far from what was predicted: give their scores less weight (step_weights), and "
                "look at the rows of these steps."
            )
        if self.sampling_error > MAX_SAMPLING_ERROR:
            found.append(
                f"The sampling error of the values is {self.sampling_error:.1f} times as large as "
                "the differences between examples: use more validation rows per step, or train "
                "longer."
            )
        return found


def summarize(
    *,
    predicted: np.ndarray | None,
    actual: np.ndarray | None,
    correlations: np.ndarray,
    conservation_errors: np.ndarray | None,
    audit_errors: np.ndarray,
    values: np.ndarray,
    value_errors: np.ndarray | None,
    tolerance: float = MAX_CONSERVATION_ERROR,
) -> Fidelity:
    """Sums up what the steps of a run measured, outside ``jax.jit``. None: it was not measured.

    Args:
      predicted, actual: [steps], decreases of the validation loss.
      correlations: [steps], of plain with optimizer-aware scores, NaN where undefined.
      conservation_errors: [steps].
      audit_errors: [steps], NaN where there was no audit.
      values, value_errors: [n], of the examples that were visited.
      tolerance: what conservation and audit error may be, for ``warnings``.

    Returns:
      The figures. What is not finite is left out and counted: a step without both decreases is
      left out of the figures about predictions, one without a conservation error of their maximum,
      an example without value or error of the sampling error. A figure of which nothing is left is
      NaN. An infinite audit error stays: that audit failed.

    >>> ones = np.ones(2)
    >>> found = summarize(predicted=np.array([1.0, 2.0]), actual=np.array([1.0, 1.8]),
    ...     correlations=ones, conservation_errors=0 * ones, audit_errors=np.nan * ones,
    ...     values=np.array([0.0, 1.0]), value_errors=0.1 * ones)
    >>> round(found.prediction_ratio, 3), found.audit_error, found.warnings()
    (0.933, None, [])
    """
    is_measured = {
        "errors": value_errors is not None,
        "predictions": predicted is not None and actual is not None,
        "certificate": conservation_errors is not None,
    }
    predicted, actual = (predicted, actual) if is_measured["predictions"] else ([], [])
    arrays = predicted, actual, conservation_errors, values, value_errors
    predicted, actual, conservation_errors, values, value_errors = (
        np.asarray([] if array is None else array, np.float64) for array in arrays
    )
    has_both = np.isfinite(predicted) & np.isfinite(actual)
    has_certificate = np.isfinite(conservation_errors)
    has_value = np.isfinite(values)
    known = [has_both] * is_measured["predictions"] + [has_certificate] * is_measured["certificate"]
    steps = len(known[0]) if known else len(correlations)
    undefined = ~np.logical_and.reduce([np.ones(steps, bool), *known])
    if is_measured["errors"]:
        has_value &= np.isfinite(value_errors)
        value_errors = value_errors[has_value]
    predicted, actual = predicted[has_both], actual[has_both]
    error = _ratio(_of(np.median, np.abs(predicted - actual)), _of(np.median, np.abs(actual)))
    is_off = far_off(predicted, actual)
    if is_off.sum() <= MAX_FAR_OFF * len(is_off):
        predicted, actual = predicted[~is_off], actual[~is_off]
    values = values[has_value]
    audited = audit_errors[~np.isnan(audit_errors)]
    together = _of(np.std, predicted) * _of(np.std, actual)
    moved = _of(np.mean, (predicted - _of(np.mean, predicted)) * (actual - _of(np.mean, actual)))
    return Fidelity(
        prediction_correlation=float(moved / together) if together > 0 else float("nan"),
        prediction_error=error,
        prediction_ratio=_ratio(actual.sum(), predicted.sum()),
        plain_correlation=_of(np.median, correlations[np.isfinite(correlations)]),
        sampling_error=_ratio(np.sqrt(_of(np.mean, value_errors**2)), _of(np.std, values)),
        conservation_error=(
            _of(np.max, conservation_errors[has_certificate])
            if is_measured["certificate"]
            else None
        ),
        audit_error=float(audited.max()) if len(audited) else None,
        undefined_steps=int(undefined.sum()),
        steps=steps,
        undefined_examples=int(np.sum(~has_value)),
        examples=len(has_value),
        far_off_steps=int(is_off.sum()),
        tolerance=tolerance,
        missing=tuple(name for name, given in is_measured.items() if not given),
    )


def _of(figure: Callable[[np.ndarray], Any], numbers: np.ndarray) -> float:
    return float(figure(numbers)) if len(numbers) else float("nan")


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole != 0 else float("nan")
