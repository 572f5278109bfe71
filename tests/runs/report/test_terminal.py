"""What a training run prints in the end."""

import dataclasses
import io

from ghostjax.runs.report.output import make_console
from ghostjax.runs.report.terminal import print_summary


def test_the_summary_ranks_what_was_visited(micro_run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    print_summary(make_console(stream), micro_run)
    text = stream.getvalue()
    for name in micro_run.sets:
        assert f"Most helpful: validation set {name}" in text
        assert f"By domain: validation set {name}" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_warnings_are_printed(micro_run):
    stream = io.StringIO()
    summary = {**micro_run.summary, "warnings": ["Beware."], "auc": {"held": 0.0}}
    cost = {"scored_step": 0.06, "plain_step": 0.012, "ratio": 2.0, "score_every": 4}
    summary["cost"] = cost
    print_summary(make_console(stream), dataclasses.replace(micro_run, summary=summary))
    assert "Warning: Beware." in stream.getvalue()
    assert "by value for validation set held: 0.000" in stream.getvalue()
    text = " ".join(stream.getvalue().split())
    assert "A scored step took 60.0 ms, a step of plain training 12.0 ms: a run" in text
    assert "that scores 1 step in 4 costs 2.00 times plain training" in text
