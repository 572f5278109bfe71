import dataclasses

import pytest

from ghostjax.fidelity import Fidelity
from ghostjax.runs.analysis.judgement import judge

GOOD = Fidelity(
    prediction_correlation=0.95,
    prediction_error=0.1,
    prediction_ratio=0.9,
    plain_correlation=0.5,
    sampling_error=0.2,
    conservation_error=1e-6,
    audit_error=1e-6,
)


@pytest.mark.parametrize(
    ("level", "changes", "words"),
    [
        ("good", {}, "90% of what was predicted"),
        ("good", {"audit_error": None}, "No step was audited"),
        ("good", {"plain_correlation": float("nan")}, "certificate"),
        ("fair", {"prediction_correlation": 0.6}, "only loosely"),
        ("fair", {"prediction_ratio": 3.0}, "another size"),
        ("fair", {"prediction_ratio": -0.5}, "the other way"),
        ("fair", {"sampling_error": 0.7}, "compare groups of examples"),
        ("fair", {"sampling_error": 1.5}, "1.5 times as large"),
        ("fair", {"prediction_error": 0.9}, "did not do what the scores predict"),
        ("poor", {"prediction_correlation": 0.1}, "did not do what the scores predict"),
        ("poor", {"prediction_correlation": float("nan")}, "cannot be told: one of them"),
        ("poor", {"sampling_error": 3.0}, "sampling error"),
        ("poor", {"conservation_error": 0.5}, "do not add up"),
        ("poor", {"conservation_error": float("nan")}, "do not add up"),
        ("poor", {"audit_error": 0.5}, "came out differently"),
        ("poor", {"undefined_steps": 1, "steps": 100}, "Of 100 steps, 1 had a predicted"),
        ("poor", {"undefined_examples": 2, "examples": 30}, "Of 30 examples, 2 have a value"),
    ],
)
def test_judgements(level, changes, words):
    found = judge(dataclasses.replace(GOOD, **changes), steps=100)
    assert found.level == level
    assert words in " ".join(found.reasons + found.findings)
    assert bool(found.reasons) == (level != "good")
    assert sum("autodiff came out" in reason for reason in found.reasons) <= 1


def test_few_steps_are_a_reason_for_caution():
    assert judge(GOOD, steps=1).level == "fair"
    assert "1 step is too few" in judge(GOOD, steps=1).reasons[0]
    assert judge(GOOD, steps=9).level == "fair"


def test_nothing_is_said_of_figures_that_nothing_is_left_of():
    nan = float("nan")
    figures = {"prediction_ratio": nan, "prediction_correlation": nan, "sampling_error": nan}
    whole = dataclasses.replace(GOOD, **figures)
    for counts in ({"undefined_steps": 9, "steps": 9}, {"undefined_examples": 9, "examples": 9}):
        found = " ".join(judge(dataclasses.replace(whole, **counts), steps=100).findings)
        assert ("no change of the validation loss" in found) == ("steps" not in counts)
        assert ("do not differ between examples" in found) == ("examples" not in counts)
