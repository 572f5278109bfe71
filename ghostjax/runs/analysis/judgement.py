"""Whether the scores of a run can be trusted, in plain words.

What is wrong with them is worded here alone: ``train``, ``rank`` and the report say the same.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ghostjax.fidelity import (
    MAX_CONSERVATION_ERROR,
    MIN_PREDICTION_CORRELATION,
    Fidelity,
    far_off,
    step_weights,
)
from ghostjax.runs.analysis.scale import number
from ghostjax.runs.analysis.values import measured
from ghostjax.runs.store.run import Run

FEW_STEPS = 10  # fewer tell little about how predictions and the loss go together
GOOD_CORRELATION = 0.7
GOOD_RATIO = (0.5, 1.5)
GOOD_SAMPLING_ERROR = 0.5
USELESS_SAMPLING_ERROR = 2.0
# What certificate and audit may be off by: rounding is far below, a missing part far above.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
MAX_NAMED = 3  # steps by their number


class Judgement(NamedTuple):
    """``level`` is good, fair or poor; the rest are sentences, ``reasons`` those against."""

    level: str
    verdict: str
    reasons: list[str]
    findings: list[str]


_VERDICTS = {
    "good": "The values can be trusted",
    "fair": "The values can be used with caution",
    "poor": "The values cannot be trusted",
}


def tolerance_of(metadata: dict[str, Any]) -> float:
    """What certificate and audit of a run may be off by, by the dtype it computes in."""
    options = metadata.get("options")
    dtype = options.get("dtype") if isinstance(options, dict) else None
    return TOLERANCES.get(dtype, MAX_CONSERVATION_ERROR)


def broken_check(
    step: int, name: str, tolerance: float, conservation: float, audit: float
) -> str | None:
    """What is wrong where certificate or audit of a step failed, in one line; else None.

    Args:
      audit: NaN where there was none.

    >>> broken_check(7, "prose", 1e-3, 1e-6, 0.02)
    'step 7, validation set prose: the audit error is 2.0e-02, more than the tolerance 1.0e-03'
    >>> broken_check(7, "prose", 1e-3, 1e-6, float("nan"))
    """
    found = {} if conservation <= tolerance else {"conservation": conservation}
    found |= {"audit": audit} if audit > tolerance else {}
    for what, error in found.items():
        return (
            f"step {step}, validation set {name}: the {what} error is {error:.1e}, more than the "
            f"tolerance {tolerance:.1e}"
        )
    return None


def warnings(run: Run, name: str, fidelity: Fidelity) -> list[str]:
    """Every reason not to trust the values for validation set ``name``, in a sentence each.

    Steps that are far from their prediction, and those at which certificate or audit failed, are
    told by their numbers.
    """
    steps, tolerance = np.flatnonzero(run.scored), tolerance_of(run.metadata)
    certificate = measured(run, f"conservation_error_{name}")
    checks = (
        np.zeros(len(steps)) if certificate is None else certificate,
        run.numbers("steps", f"audit_error_{name}")[steps],
    )
    broken = [broken_check(step, name, tolerance, *errors) for step, *errors in zip(steps, *checks)]
    return [
        *fidelity.warnings(),
        *_first(f"Broken at {line}." for line in broken if line),
        *_far_off_steps(run, name),
    ]


def _first(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return lines[:MAX_NAMED] + _more(len(lines))


def _more(count: int) -> list[str]:
    return [f"So it is in {count - MAX_NAMED} more steps."] if count > MAX_NAMED else []


def _far_off_steps(run: Run, name: str) -> list[str]:
    """One sentence each, that with the largest difference first."""
    predicted, actual = (run.numbers("steps", f"{what}_{name}") for what in ("predicted", "actual"))
    steps = np.flatnonzero(far_off(predicted, actual))
    if not len(steps):
        return []
    weights = step_weights(predicted, actual)
    named = steps[np.argsort(-np.abs(predicted - actual)[steps], kind="stable")][:MAX_NAMED]
    largest = _largest_scores(run, f"score_{name}", named)
    return [
        f"Step {step}, validation set {name}: predicted a decrease of {number(predicted[step])}, "
        f"actual {number(actual[step])}; the largest score is that of row {largest[step][0]}, "
        f"{largest[step][1]}; the step's scores count {number(weights[step], 2)} in the values."
        for step in named.tolist()
    ] + _more(len(steps))


def _largest_scores(run: Run, column: str, steps: np.ndarray) -> dict[int, tuple[int, str]]:
    """By step, which row has the largest score, and whose it is."""
    found = {}
    for some in run.visits(column):
        for step in steps[np.isin(steps, some["step"])].tolist():
            first, end = np.searchsorted(some["step"], [step, step + 1])
            row = int(np.argmax(np.abs(some[column][first:end])))
            found[step] = row, run.ids[int(some["place"][first + row])].as_py()
    return found


def judge(fidelity: Fidelity, steps: int, warnings: list[str] | None = None) -> Judgement:
    """Judges the values for one validation set after so many steps.

    Args:
      warnings: those of the run; by default those of ``fidelity`` alone.
    """
    reasons = fidelity.warnings() if warnings is None else list(warnings)
    if steps < FEW_STEPS:  # neither for nor against
        calm = {"prediction_correlation": 1.0, "prediction_error": 0.0, "far_off_steps": 0}
        left = dataclasses.replace(fidelity, **calm).warnings()
        reasons = [line for line in reasons if line in left or line not in fidelity.warnings()]
    poor = _is_poor(fidelity, steps)
    if steps < FEW_STEPS:
        reasons.append(
            f"{steps} {'step is' if steps == 1 else 'steps are'} too few to tell whether the loss "
            "does what the scores predict."
        )
    elif not reasons:
        reasons += _doubts(fidelity)
    level = "poor" if poor else "fair" if reasons else "good"
    return Judgement(level, _VERDICTS[level], reasons, _findings(fidelity))


def _is_poor(fidelity: Fidelity, steps: int) -> bool:
    """Whether there is a reason that leaves nothing of the values."""
    unrelated = not (
        "predictions" in fidelity.missing
        or fidelity.prediction_correlation >= MIN_PREDICTION_CORRELATION / 2
    )
    return (
        fidelity.undefined_steps > 0
        or fidelity.undefined_examples > 0
        or _exceeds(fidelity.conservation_error, fidelity.tolerance)
        or _exceeds(fidelity.audit_error, fidelity.tolerance)
        or not ("errors" in fidelity.missing or fidelity.sampling_error <= USELESS_SAMPLING_ERROR)
        or (steps >= FEW_STEPS and unrelated)
    )


def _exceeds(error: float | None, bound: float) -> bool:
    return error is not None and not error <= bound


def _doubts(fidelity: Fidelity) -> list[str]:
    """Sentences on what is not wrong, but not good either."""
    found = []
    if math.isnan(fidelity.prediction_correlation):
        found.append(
            "Whether the loss does what the scores predict cannot be told: one of them never "
            "changed."
        )
    elif not fidelity.prediction_correlation >= GOOD_CORRELATION:
        found.append("The loss follows the scores' predictions only loosely.")
    low, high = GOOD_RATIO
    if not low <= fidelity.prediction_ratio <= high:
        found.append(
            "The predicted decreases add up to another size than the actual ones: the order of the "
            "values says more than their size."
        )
    if not fidelity.sampling_error <= GOOD_SAMPLING_ERROR:
        found.append(
            "A good part of the differences between examples is sampling error: compare groups of "
            "examples rather than single ones, or use more validation rows per step."
        )
    return found


def _findings(fidelity: Fidelity) -> list[str]:
    """What was measured, one sentence each."""
    found = []
    is_told = math.isfinite(fidelity.prediction_ratio) or not fidelity.undefined_steps
    if is_told and "predictions" not in fidelity.missing:
        found.append(_prediction(fidelity.prediction_ratio))
    if math.isfinite(fidelity.prediction_correlation):
        found.append(
            "From step to step, predicted and actual decrease have a correlation of "
            f"{number(fidelity.prediction_correlation, 2)} (1 is perfect, 0 is none), and the "
            f"typical prediction is off by {_percent(fidelity.prediction_error)} of the actual "
            "decrease."
        )
    if math.isfinite(fidelity.sampling_error):
        found.append(
            f"The sampling error of a value is {_percent(fidelity.sampling_error)} of the typical "
            "difference between examples. It comes from drawing a few validation rows per step."
        )
    elif not fidelity.undefined_examples and "errors" not in fidelity.missing:
        found.append("The values do not differ between examples, so their error means little.")
    if fidelity.conservation_error is not None:
        found.append(
            "The certificate, that the scores add up to what the gradient says, was checked at "
            "every scored step, for all parts of the validation rows: the largest conservation "
            f"error is {number(fidelity.conservation_error, 2)}."
        )
    if fidelity.audit_error is not None:
        found.append(
            "Some rows were redone by plain autodiff, without ghostjax: the largest difference is "
            f"{number(fidelity.audit_error, 2)} of the largest score."
        )
    else:
        found.append("No step was audited by plain autodiff.")
    if math.isfinite(fidelity.plain_correlation):
        found.append(
            "Plain inner products of gradients, which leave out the optimizer, have a median "
            f"correlation of {number(fidelity.plain_correlation, 2)} with the scores, at the steps "
            "where it was measured."
        )
    return found


def _prediction(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "In sum, no change of the validation loss was predicted."
    if ratio < 0:
        return (
            "Summed over the steps, the validation loss moved the other way than was predicted for "
            "the updates."
        )
    return (
        "Summed over the steps, what the updates did to the validation loss is "
        f"{_percent(ratio)} of what was predicted."
    )


def _percent(part: float) -> str:
    return f"{number(100 * part, 2)}%" if part < 9.995 else f"{number(part, 2)} times"
