"""What a training run prints on its way."""

import io

import numpy as np

from ghostjax.runs.report.output import make_console
from ghostjax.runs.report.progress import Progress
from ghostjax.runs.training.trainer import Step
from tests.runs.training.test_trainer import record


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def show(stream, count, start=0):
    with Progress(make_console(stream), start, count, 2) as progress:
        for number in range(start, count):
            found = record(steps={"loss": np.float32(3 - number), "val_loss": np.float32([4, 5])})
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
    with Progress(None, 0, 1, 2) as progress:
        progress.step(Step(0, 0.1, None, record()))
    assert capsys.readouterr() == ("", "")
