"""What a training run prints."""

import dataclasses
import io

import numpy as np
import pytest

from ghostjax.runs import terminal
from ghostjax.runs.output import make_console
from ghostjax.runs.ranking import Valued
from ghostjax.runs.statistics import roc_auc
from ghostjax.runs.summary import own_above, values_by_domain
from ghostjax.runs.training import Step
from tests.runs.test_training import record


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def show(stream, count, start=0):
    with terminal.Progress(make_console(stream), start, count, 2) as progress:
        for number in range(start, count):
            found = record(loss=np.float32(3 - number), val_loss=np.float32([4, 5]))
            progress.step(Step(number, 0.1, None, found))


def test_progress_without_a_terminal_is_a_few_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    show(stream, 50)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 1/50  loss 3.000  validation loss 4.000/5.000"
    assert lines[-1].startswith("step 50/50  loss -46.000  validation loss 4.000/5.000  ")
    assert lines[-1].endswith(" rows/s")
    assert all(line.isprintable() for line in lines)


def test_progress_goes_on_where_a_run_is_resumed():
    stream = io.StringIO()
    show(stream, 50, start=42)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["43/50", "45/50", "50/50"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    show(stream, 3)
    assert "3/3" in stream.getvalue()
    assert "validation loss 4.000/5.000" in stream.getvalue()
    assert "\x1b" in stream.getvalue()


def test_a_quiet_run_prints_nothing(capsys):
    with terminal.Progress(None, 0, 1, 2) as progress:
        progress.step(Step(0, 0.1, None, record()))
    assert capsys.readouterr() == ("", "")


def test_the_summary_ranks_what_was_visited(micro_run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    terminal.print_summary(make_console(stream), micro_run)
    text = stream.getvalue()
    for name in micro_run.sets:
        assert f"Most helpful examples for validation set {name}" in text
        assert f"Value by domain for validation set {name}" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_warnings_are_printed(micro_run):
    stream = io.StringIO()
    summary = {**micro_run.summary, "warnings": ["Beware."], "auc": {"held": 0.75}}
    terminal.print_summary(make_console(stream), dataclasses.replace(micro_run, summary=summary))
    assert "Warning: Beware." in stream.getvalue()
    assert "by value for validation set held: 0.750" in stream.getvalue()


def valued(domains, values, visits):
    texts = np.array(domains, object)
    values = np.array(values, float)
    return Valued(texts, texts, texts, np.array(visits), values, np.zeros_like(values))


def test_values_by_domain():
    assert values_by_domain(valued(["b", "a", "b", "c"], [1, 4, 2, 0], [1, 2, 1, 0])) == {
        "a": {"examples": 1, "visits": 2, "value": 4.0, "mean": 4.0},
        "b": {"examples": 2, "visits": 2, "value": 3.0, "mean": 1.5},
        "c": {"examples": 1, "visits": 0, "value": 0.0, "mean": None},
    }


@pytest.mark.parametrize(
    ("domains", "visits", "expected"),
    [
        (["prose", "code", "code"], [1, 1, 0], 1.0),
        (["prose", "code", "forum"], [1, 1, 1], 0.5),
        (["prose", "prose", "prose"], [1, 1, 1], None),
        (["prose", "prose", "code"], [1, 1, 0], None),
        (["code", "code", "code"], [1, 1, 1], None),
    ],
)
def test_how_well_a_set_tells_its_own_domain(domains, visits, expected):
    assert own_above("prose", valued(domains, [2, 1, 3], visits)) == expected


def test_roc_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 30).astype(float), rng.integers(0, 7, 20).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    assert roc_auc(high, low) == pytest.approx(np.mean(pairs))
