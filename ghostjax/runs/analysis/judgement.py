"""Whether the scores of a run can be trusted, in plain words."""

import dataclasses
import math
from typing import NamedTuple

from ghostjax.fidelity import (
    MAX_AUDIT_ERROR,
    MAX_CONSERVATION_ERROR,
    MIN_PREDICTION_CORRELATION,
    Fidelity,
)
from ghostjax.runs.analysis.scale import number

FEW_STEPS = 10  # fewer tell little about how predictions and the loss go together
GOOD_CORRELATION = 0.7
GOOD_RATIO = (0.5, 1.5)
GOOD_SAMPLING_ERROR = 0.5
USELESS_SAMPLING_ERROR = 2.0


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


def judge(fidelity: Fidelity, steps: int) -> Judgement:
    """Judges the values for one validation set after so many steps."""
    told = fidelity
    if steps < FEW_STEPS:  # neither for nor against
        told = dataclasses.replace(fidelity, prediction_correlation=1.0, prediction_error=0.0)
    reasons = told.warnings()
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
    unrelated = not fidelity.prediction_correlation >= MIN_PREDICTION_CORRELATION / 2
    return (
        fidelity.undefined_steps > 0
        or fidelity.undefined_examples > 0
        or not fidelity.conservation_error <= MAX_CONSERVATION_ERROR
        or _exceeds(fidelity.audit_error, MAX_AUDIT_ERROR)
        or not fidelity.sampling_error <= USELESS_SAMPLING_ERROR
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
    if math.isfinite(fidelity.prediction_ratio) or not fidelity.undefined_steps:
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
    elif not fidelity.undefined_examples:
        found.append("The values do not differ between examples, so their error means little.")
    found.append(
        "The certificate, that the scores add up to what the gradient says, was checked at every "
        f"step: the largest conservation error is {number(fidelity.conservation_error, 2)}."
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
            f"correlation of {number(fidelity.plain_correlation, 2)} with the scores."
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
