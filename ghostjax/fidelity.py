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

MAX_CONSERVATION_ERROR = 0.03  # bfloat16 models are at a hundredth, float32 ones at 1e-5
MAX_AUDIT_ERROR = MAX_CONSERVATION_ERROR
MAX_PREDICTION_ERROR = 0.5  # of the actual decrease, in the median step
MIN_PREDICTION_CORRELATION = 0.5
MAX_SAMPLING_ERROR = 1.0  # of the spread of the values


def predicted_decrease(val_grads: Any, updates: Any) -> jax.Array:
    """The decrease of the validation loss that its gradient predicts for an update.

        - < val_grads, updates >

    With the gradient at the parameters it is right to first order, with that of
    ``directions.midpoint`` to second.

    Returns:
      float32 scalar, in the unit of the loss. ``actual`` is the loss of the same validation rows
      before the update minus that after it.

    >>> import jax.numpy as jnp
    >>> predicted_decrease(jnp.array([1.0, 2.0]), jnp.array([-0.5, 0.0]))
    Array(0.5, dtype=float32)
    """
    return -_inner_product(val_grads, updates)


def correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Pearson correlation over the last axis: of plain with optimizer-aware scores, for instance.

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


def audit(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    batch: Any,
    *args: Any,
    direction: Any,
    dots: jax.Array,
    rows: jax.Array,
    **kwargs: Any,
) -> jax.Array:
    """Redoes some rows by autodiff of these rows alone, at the live parameters.

        error = max_r | dots[r] - < g[r], direction > | / max_i | dots[i] |
        g[r] = d loss_fn(params, batch[r : r + 1]) / d params

    It shares no code with what it audits.

    Args:
      loss_fn: the mean loss; of a batch of one row, that row's own loss.
      dots: [B], the sum over the parameters, as ``result.total()`` gives it.
      rows: [n] integers, which rows to redo; each takes a gradient.
      args, kwargs: passed on to ``loss_fn``.

    Returns:
      float32 scalar; infinite where a number that is not finite leaves nothing to compare.

    >>> import jax, jax.numpy as jnp
    >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w, x = jnp.ones(2), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> audit(loss_fn, w, x, direction=w, dots=jnp.array([4.0, 9.0]), rows=jnp.array([1]))
    Array(0.5, dtype=float32)
    """

    def redo(row):
        single = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), batch)
        return _inner_product(jax.grad(loss_fn)(params, single, *args, **kwargs), direction)

    expected = jax.lax.map(redo, rows)
    size = jnp.maximum(jnp.max(jnp.abs(dots)), jnp.max(jnp.abs(expected)))
    error = jnp.max(jnp.abs(dots[rows] - expected)) / jnp.where(size > 0, size, 1)
    # Not NaN, which is below every tolerance and stands for "no audit" in a log.
    return jnp.where(jnp.isnan(error), jnp.inf, error).astype(jnp.float32)


def _inner_product(first: Any, second: Any) -> jax.Array:
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), first, second
    )
    return sum(jax.tree.leaves(products))


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The fidelity of a run's scores for one validation set; see ``summarize``.

    Attributes:
      prediction_correlation: Pearson, over the steps, of predicted and actual decrease.
      prediction_error: median of |predicted - actual| over the median of |actual|.
      prediction_ratio: sum of the actual decreases over that of the predicted ones.
      plain_correlation: median over the steps of the correlation of the scores with plain dots.
      sampling_error: root mean square of the values' standard errors over the values' spread.
      conservation_error: the largest of any step.
      audit_error: the largest of any audited step, None if there was none.
    """

    prediction_correlation: float
    prediction_error: float
    prediction_ratio: float
    plain_correlation: float
    sampling_error: float
    conservation_error: float
    audit_error: float | None

    def warnings(self) -> list[str]:
        """Plain sentences, one for every reason not to trust the scores."""
        found = []
        if not self.conservation_error <= MAX_CONSERVATION_ERROR:
            found.append(
                "The scores do not add up to what the gradient says: the conservation error "
                f"reached {self.conservation_error:.1e}. Numbers may be out of range, or a use of "
                "a parameter is missing."
            )
        if self.audit_error is not None and not self.audit_error <= MAX_AUDIT_ERROR:
            found.append(
                "Rows that were redone by plain autodiff came out differently: the audit error "
                f"reached {self.audit_error:.1e} of the largest score."
            )
        # NaN, where there is too little to tell, is no reason by itself.
        if (
            self.prediction_error > MAX_PREDICTION_ERROR
            or self.prediction_correlation < MIN_PREDICTION_CORRELATION
        ):
            found.append(
                "The validation loss did not do what the scores predict (correlation over the "
                f"steps {self.prediction_correlation:.2f}, typical error "
                f"{self.prediction_error:.0%} of the actual decrease): the steps are too large. "
                "Lower the learning rate or, where the scores are of order 1, take the validation "
                "gradient half-way along the update (--order 2; directions.midpoint)."
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
    predicted: np.ndarray,
    actual: np.ndarray,
    correlations: np.ndarray,
    conservation_errors: np.ndarray,
    audit_errors: np.ndarray,
    values: np.ndarray,
    value_errors: np.ndarray,
) -> Fidelity:
    """Sums up what the steps of a run measured, outside ``jax.jit``.

    Args:
      predicted, actual: [steps], decreases of the validation loss.
      correlations: [steps], of plain with optimizer-aware scores, NaN where undefined.
      conservation_errors: [steps].
      audit_errors: [steps], NaN where there was no audit.
      values, value_errors: [n], of the examples that were visited.

    >>> ones = np.ones(2)
    >>> found = summarize(predicted=np.array([1.0, 2.0]), actual=np.array([1.0, 1.8]),
    ...     correlations=ones, conservation_errors=0 * ones, audit_errors=np.nan * ones,
    ...     values=np.array([0.0, 1.0]), value_errors=0.1 * ones)
    >>> round(found.prediction_ratio, 3), found.audit_error, found.warnings()
    (0.933, None, [])
    """
    audited = audit_errors[~np.isnan(audit_errors)]
    defined = correlations[~np.isnan(correlations)]
    spread = np.std(values)
    together = np.std(predicted) * np.std(actual)
    moved = np.mean((predicted - predicted.mean()) * (actual - actual.mean()))
    return Fidelity(
        prediction_correlation=float(moved / together) if together > 0 else float("nan"),
        prediction_error=_ratio(np.median(np.abs(predicted - actual)), np.median(np.abs(actual))),
        prediction_ratio=_ratio(actual.sum(), predicted.sum()),
        plain_correlation=float(np.median(defined)) if len(defined) else float("nan"),
        sampling_error=_ratio(np.sqrt(np.mean(value_errors**2)), spread),
        conservation_error=float(np.max(conservation_errors)),
        audit_error=float(audited.max()) if len(audited) else None,
    )


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole != 0 else float("nan")
