import dataclasses

import numpy as np
import pytest

from ghostjax.fidelity import Fidelity
from ghostjax.runs.analysis.judgement import broken_check, judge, tolerance_of, warnings
from ghostjax.runs.analysis.summary import measure_fidelity
from ghostjax.runs.analysis.values import read_values, weights_of_steps
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import BATCH_SIZE, changed_steps, write_run

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
        ("fair", {"far_off_steps": 11, "steps": 100}, "the steps are too large"),
        ("fair", {"far_off_steps": 1, "steps": 100}, "In 1 of 100 steps"),
        ("poor", {"conservation_error": 2e-3, "tolerance": 1e-3}, "do not add up"),
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


@pytest.fixture
def one_off(tmp_path):
    """A run in which one step was predicted to do what it did not."""
    path = write_run(tmp_path / "run")
    changed_steps(path, 7, predicted_code=-6.7, actual_code=-0.025)
    return read_run(path)


def told(run, name):
    return warnings(run, name, measure_fidelity(run, name, read_values(run)[name]))


def test_a_step_that_is_far_off_is_named_and_counts_less(one_off):
    assert told(one_off, "prose") == []
    lines = told(one_off, "code")
    assert lines[0].startswith("In 1 of 30 steps, the validation loss did something far from")
    scores = one_off.numbers("scores", "score_code")[7 * BATCH_SIZE : 8 * BATCH_SIZE]
    row = int(np.argmax(np.abs(scores)))
    assert lines[1].startswith(
        "Step 7, validation set code: predicted a decrease of \u22126.70, actual \u22120.0250; the "
        f"largest score is that of row {row}, {one_off.scores['id'][7 * BATCH_SIZE + row]}; the "
    )
    assert len(lines) == 2
    assert not any("too large" in line for line in lines)
    weights = weights_of_steps(one_off, "code")
    typical = np.median(np.abs(one_off.numbers("steps", "actual_code")))
    np.testing.assert_allclose(weights[7], (0.025 + 2 * typical) / 6.7)
    assert (np.delete(weights, 7) == 1).all()
    # The log keeps what was measured.
    assert (one_off.numbers("scores", "score_code") != 0).all()


def test_of_many_steps_that_are_far_off_three_are_named(tmp_path):
    path = write_run(tmp_path / "run")
    for step in range(5):
        changed_steps(path, step, predicted_code=1.0 + step)
    lines = told(read_run(path), "code")
    assert "the steps are too large" in lines[0]
    assert [line[:7] for line in lines[1:4]] == ["Step 4,", "Step 3,", "Step 2,"]
    assert lines[4:] == ["So it is in 2 more steps."]


@pytest.mark.parametrize("what", ["conservation", "audit"])
def test_a_broken_check_is_told_by_its_step(tmp_path, what):
    path = write_run(tmp_path / "run", options={"dtype": "float32"})
    changed_steps(path, 9, **{f"{what}_error_code": 0.0021})
    run = read_run(path)
    assert tolerance_of(run.metadata) == 1e-3
    assert told(run, "prose") == []
    assert told(run, "code")[1:] == [
        f"Broken at step 9, validation set code: the {what} error is 2.1e-03, more than the "
        "tolerance 1.0e-03."
    ]


def test_tolerances():
    nan = float("nan")
    assert tolerance_of({"options": {"dtype": "bfloat16"}}) == 0.1
    assert tolerance_of({}) == 0.03
    assert broken_check(1, "val", 1e-3, 1e-3, nan) is None
    assert "the conservation error is nan" in broken_check(1, "val", 1e-3, nan, nan)
    assert "the audit error is inf" in broken_check(1, "val", 1e-3, 0.0, float("inf"))
