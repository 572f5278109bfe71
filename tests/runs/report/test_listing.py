"""The list of examples on the page, and the window of each that is shown."""

import json
import re

import numpy as np
import pytest

from ghostjax.cli import main
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.report.page import make_report
from ghostjax.runs.report.windows import Windows
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import EXAMPLES, write_run


def listed(text):
    """The rows of the first table of examples: the cells' texts."""
    body = text.split('<section class="listing">')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.strip().split("\n")]


def test_every_example_is_listed_with_its_verdict_also_those_not_visited(tmp_path):
    domains, ids = ("one",) * EXAMPLES, tuple(f"e:{n}" for n in range(EXAMPLES))
    source = read_run(write_run(tmp_path / "run", steps=4, domains=domains, ids=ids, sets=("val",)))
    text, rows = make_report(source), listed(make_report(source))
    valued = read_values(source)["val"]
    assert 0 < valued.visited.sum() < EXAMPLES == len(rows)
    assert f"{EXAMPLES} of {EXAMPLES} examples." in text
    shown = {re.sub("<.*?>", "", row[1]): row for row in rows}
    for name, visited, verdict in zip(valued.ids, valued.visited, valued.verdicts):
        assert f'<span class="verdict-name">{verdict}</span>' in shown[name][6]
        assert (shown[name][0], shown[name][3]) == ("-", "-") or visited
    assert [row[0] for row in rows[: valued.visited.sum()]] == [
        str(n + 1) for n in range(valued.visited.sum())
    ]
    assert re.sub("<.*?>", "", shown[valued.ids[valued.visited][0]][7]) == "windows from token 0"


@pytest.mark.parametrize("most", [300, 8])
def test_of_a_long_text_the_window_that_counted_most_is_shown(
    micro_run, tmp_path, capsys, monkeypatch, most
):
    monkeypatch.setattr("ghostjax.runs.report.windows.MAX_CHARACTERS", most)
    assert main(["show", str(micro_run.path), "forum:4", "--json", "--set", "held"]) == 0
    visits = json.loads(capsys.readouterr().out)
    value = read_values(micro_run)["held"].values[4]
    assert micro_run.examples["id"][4].as_py() == "forum:4"
    ends = max if value > 0 else min
    visit = ends(visits, key=lambda visit: visit["weight"] * visit["score"])
    assert len({visit["start"] for visit in visits}) > 1

    out = tmp_path / "page.html"
    assert main(["report", str(micro_run.path), "--out", str(out), "--quiet"]) == 0
    text = out.read_text()
    assert "Texts are shown from their beginning" not in text
    rows = {re.sub("<.*?>", "", row[1]): row for row in listed(text)}
    window = visit["window"] if most == 300 else visit["window"][:7] + "…"
    assert rows["forum:4"][8] == window
    words = f"shown is the one from {visit['start']}, step {visit['step']}, which counted most"
    assert rows["forum:4"][7].endswith(f"; {words}")
    assert text.count(f'<p class="excerpt" dir="auto">{window}</p>') >= 1
    task = read_task(micro_run)[1]
    task.length = 200  # so that every text fits into a window
    windows = Windows(micro_run, task, np.array([4]))
    assert windows.of("held", 4).text == ("line 4 of the forum, " * 5).strip()

    assert main(["report", str(micro_run.path), "--out", str(out), "--no-windows", "--quiet"]) == 0
    rows = {re.sub("<.*?>", "", row[1]): row for row in listed(out.read_text())}
    assert rows["forum:4"][8] == ("line 4 of the forum, " * 5).strip()
    assert "shown" not in rows["forum:4"][7]


def test_a_long_table_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr("ghostjax.runs.report.page.MAX_LISTED", 3)
    text = make_report(read_run(write_run(tmp_path / "run")))
    assert len(listed(text)) == 6
    assert "6 of 40 examples: up to 3 of either end" in text
    assert "Left out are 34 between them and 0 not visited; values.parquet has all of them." in text
