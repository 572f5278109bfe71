import io

import numpy as np
import pytest

from ghostjax.runs import report
from ghostjax.runs.documents import Document
from ghostjax.runs.training import Visits


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([1, 3], [2, 0], 0.75),  # of four pairs, 1 < 2 alone is wrong
        ([1, 2], [1], 0.75),  # one tie, one right
        ([5], [1, 5, 5, 7], 0.5),  # one right, two ties, one wrong
    ],
)
def test_roc_auc_by_hand(positives, negatives, expected):
    found = report.roc_auc(np.array(positives, float), np.array(negatives, float))
    assert found == pytest.approx(expected)


def test_roc_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 30).astype(float), rng.integers(0, 7, 20).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    assert report.roc_auc(high, low) == pytest.approx(np.mean(pairs))


def test_scores_by_domain():
    found = report.scores_by_domain(
        ["b", "a", "b", "c"], np.array([1.0, 4.0, 2.0, 0.0]), np.array([1, 2, 1, 0])
    )
    assert found == {
        "a": {"documents": 1, "visits": 2, "score": 4.0, "mean_score": 4.0},
        "b": {"documents": 2, "visits": 2, "score": 3.0, "mean_score": 1.5},
        "c": {"documents": 1, "visits": 0, "score": 0.0, "mean_score": None},
    }


def test_auc_is_for_prose_and_code_alone():
    scores, visits = np.array([2.0, 1.0, 3.0]), np.array([1, 1, 0])
    assert report.prose_above_code(["prose", "code", "code"], scores, visits) == 1.0
    assert report.prose_above_code(["prose", "code", "code"], scores, visits + 1) == 0.5
    assert report.prose_above_code(["prose", "code", "forum"], scores, visits) is None
    assert report.prose_above_code(["prose", "prose", "prose"], scores, visits) is None
    assert report.prose_above_code(["prose", "prose", "code"], scores, visits) is None


DOCUMENTS = [
    Document("wiki[1]:0", "wiki[1]", b"good [bold]text[/bold] \x1b[31mred"),
    Document("wiki[1]:1", "wiki[1]", "schön".encode()),
    Document("forum:0", "forum", b"bad"),
    Document("forum:1", "forum", b"never seen"),
]


def printed(stream, scores):
    scores, visits = np.array(scores), np.array([2, 2, 2, 0])
    domains = [document.domain for document in DOCUMENTS]
    summary = {
        "loss": 1.0,
        "val_loss": 2.0,
        "auc": None,
        "domains": report.scores_by_domain(domains, scores, visits),
    }
    report.print_report(report.make_console(stream), DOCUMENTS, scores, visits, summary)
    stream.flush()


def test_the_report_ranks_what_was_visited(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    printed(stream, [0.5, 0.25, -0.125, 0.0])
    helpful, harmful = stream.getvalue().split("Most harmful documents")
    assert helpful.index("wiki[1]:0") < helpful.index("wiki[1]:1") < helpful.index("forum:0")
    assert "forum:0" in harmful
    assert "wiki[1]:0" not in harmful
    assert "forum:1" not in stream.getvalue()
    assert "good [bold]text[/bold] [31mred" in stream.getvalue()
    assert "+5.00e-01" in helpful
    assert "-1.25e-01" in harmful
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))


def test_no_document_is_called_harmful_that_was_not():
    stream = io.StringIO()
    printed(stream, [0.5, 0.25, 0.125, 0.0])
    assert "Most harmful" not in stream.getvalue()
    assert "Least helpful documents (none has a negative score)" in stream.getvalue()


def test_a_stream_that_is_not_unicode_gets_what_it_can_hold():
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    printed(stream, [0.5, 0.25, -0.125, 0.0])
    assert b"sch?n" in buffer.getvalue()


def visits(count):
    nothing = np.zeros(2, int)
    return (Visits(n, 3.0 - n, 4.0, 0.1, nothing, nothing, np.zeros(2)) for n in range(count))


def test_progress_without_a_terminal_is_a_few_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    done = report.follow(visits(50), 50, 2, report.make_console(stream))
    lines = stream.getvalue().splitlines()
    assert len(done) == 50
    assert len(lines) == 11
    assert lines[0] == "step 1/50  loss 3.000  validation loss 4.000"
    assert lines[-1].startswith("step 50/50  loss -46.000  validation loss 4.000  ")
    assert lines[-1].endswith(" rows/s")
    assert all(line.isprintable() for line in lines)


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    report.follow(visits(3), 3, 2, report.make_console(stream))
    assert "3/3" in stream.getvalue()
    assert "validation loss 4.000" in stream.getvalue()
    assert "rows/s" in stream.getvalue()
    assert "\x1b" in stream.getvalue()
