import base64
import dataclasses
import hashlib
import html.parser
import json
import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from ghostjax.cli import main
from ghostjax.runs.analysis.judgement import judge
from ghostjax.runs.analysis.scale import Scale, number
from ghostjax.runs.analysis.summary import measure_fidelity
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.commands.report import ReportConfig
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.report.page import make_report
from ghostjax.runs.report.windows import Windows
from ghostjax.runs.store.files import read_json, write_json
from ghostjax.runs.store.run import read_run
from tests.runs.checks import fails, files
from tests.runs.made_up import (
    DOMAINS,
    EXAMPLES,
    KINDS,
    SETS,
    STEPS,
    changed_steps,
    write_run,
)

VOID = {"meta", "input", "line", "rect", "circle", "path"}  # circle and the like close themselves


class Page(html.parser.HTMLParser):
    """What a page is made of: (tag, attributes), texts by tag, and whether all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self):
        return " ".join(data for tag, data in self.texts if tag not in ("style", "script"))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("html") / "run")


@pytest.fixture(scope="module")
def report(made_up):
    return make_report(read_run(made_up))


@pytest.fixture(scope="module")
def page(report):
    return Page(report)


def test_the_command_writes_one_file_and_prints_its_path(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    before = files(path)
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr() == (f"{path / 'report.html'}\n", "")
    after = files(path)
    assert after.pop("report.html")
    assert after == before
    text = (path / "report.html").read_text(encoding="utf-8")
    note = "Texts are shown from their beginning, not in windows: "
    assert note in text
    (told,) = re.findall(f"<p>{note}.*?</p>\n", text)
    assert text.replace(told, "") == make_report(read_run(path))

    assert main(["report", str(path), "--quiet", "--count", "3", "--no-windows"]) == 0
    assert capsys.readouterr() == ("", "")
    shorter = (path / "report.html").read_text(encoding="utf-8")
    assert shorter.count('<p class="excerpt"') == 2 * 3 * len(SETS)


def test_out_names_the_file_and_nothing_else_is_written(tmp_path, capsys):
    path, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    before = files(path)
    assert main(["report", str(path), "--out", str(out), "--no-windows"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert out.read_text(encoding="utf-8") == make_report(read_run(path))
    assert files(path) == before
    assert f"--out {path} is a directory: name a file in it" in fails(
        ["report", path, "--out", path], capsys
    )
    nowhere = tmp_path / "none" / "page.html"
    message = fails(["report", path, "--out", nowhere], capsys)
    assert f"--out {nowhere}: there is no directory {tmp_path / 'none'}" in message
    assert main(["report", str(path), "--out", "/proc/page.html"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_everything_that_was_asked_for_is_there(page, made_up):
    text = page.text()
    for heading in (
        "Can the values be trusted?",
        "Distribution of the values",
        "Values by domain",
        "Values over training time",
        "Predicted and actual decrease",
        "Share by kind of layer",
        "Examples: most helpful",
        "Examples: most harmful",
        "Losses",
        "Options and versions",
    ):
        assert heading in text
    for name in (*SETS, *DOMAINS, *KINDS):
        assert name in text
    for name, valued in read_values(read_run(made_up)).items():
        ranked = valued.ranked()
        assert f"Validation set {name}" in text
        assert ranked.ids[0] in text
        assert ranked.excerpts[-1] in text


def test_the_figures_are_those_of_the_log(page, made_up):
    source = read_run(made_up)
    valued = read_values(source)["prose"]
    scale, text = Scale.typical(valued.values), page.text()
    ranked = valued.ranked()
    for n in (0, -1):
        assert f"{scale.signed(ranked.values[n])} ± {scale.plain(ranked.errors[n])}" in text
    assert f"Of {EXAMPLES} examples that were visited, {(valued.values > 0).sum()} helped" in text
    predicted, actual = (source.steps[f"{n}_prose"].to_numpy() for n in ("predicted", "actual"))
    assert predicted.sum() > 0 < actual.sum()
    assert f"lower the loss on prose by {number(predicted.astype(float).sum())}; they " in text
    assert f"lowered it by {number(actual.astype(float).sum())} (on the" in text
    mean = scale(valued.values[valued.domains == "wiki"].mean())
    assert f"The domain with the highest mean is wiki ({number(float(mean))})" in text
    kinds = source.kinds.to_pylist()
    sums = {
        kind: sum(row["score"] for row in kinds if (row["kind"], row["set"]) == (kind, "prose"))
        for kind in KINDS
    }
    share = abs(sums["attention"]) / sum(map(abs, sums.values()))
    assert f"attention {share:.0%}" in text


def test_nothing_is_loaded_and_no_other_script_is_run(page, report):
    scripts = [data for tag, data in page.texts if tag == "script"]
    digest = base64.b64encode(hashlib.sha256("".join(scripts).encode()).digest()).decode()
    assert len(page.named("script")) == 1
    assert "innerHTML" not in scripts[0]
    policy = [tag for tag in page.named("meta") if "http-equiv" in tag]
    assert [tag["http-equiv"] for tag in policy] == ["Content-Security-Policy"]
    assert policy[0]["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert not {"link", "img", "iframe", "object", "base"} & {n for n, _ in page.tags}
    for name, attrs in page.tags:
        assert not any(key.startswith("on") for key in attrs), name
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    assert "@import" not in report
    assert "url(" not in report
    outside = re.findall(r"https?:[^\s\"'<]*", report)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a name, nothing is loaded from it


def test_links_lead_to_places_on_the_page(page):
    places = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(places) == len(set(places))
    links = [attrs["href"] for attrs in page.named("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(places)


def test_it_can_be_read_without_seeing_it(page):
    assert page.named("html") == [{"lang": "en"}]
    viewport = [tag["content"] for tag in page.named("meta") if tag.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]
    places = {attrs.get("id") for _, attrs in page.tags}
    pictures = page.named("svg")
    assert len(pictures) == 7 * len(SETS) + 1
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= places
    count = sum(name in ("title", "desc") for name, _ in page.tags)
    assert count == 2 * len(pictures) + 1
    assert all(data.strip() for tag, data in page.texts if tag in ("title", "desc"))

    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))

    tables = page.named("table")
    assert len(tables) == len(page.named("caption")) == len(pictures) + len(SETS) + 1
    assert {attrs.get("scope") for attrs in page.named("th")} == {"col", "row"}
    for name in ("main", "header", "footer", "nav"):
        assert len(page.named(name)) == 1


HOSTILE = "<script>alert(1)</script> \"double\" 'single' & </style></svg> \x1b[31m\u202eback"


def test_texts_of_the_data_stay_texts(tmp_path):
    domains = tuple(f"{HOSTILE}{n % 9}" for n in range(EXAMPLES))
    path = write_run(
        tmp_path / '<b onclick="x()">',
        domains=domains,
        excerpts=dict.fromkeys(range(EXAMPLES), HOSTILE),
        unit="<i>nats</i>",
        options={"steps": STEPS, HOSTILE: HOSTILE},
    )
    text = make_report(read_run(path))
    page = Page(text)
    names = {name for name, _ in page.tags}
    assert not {"b", "i"} & names
    assert len(page.named("script")) == 1
    assert not any("onclick" in attrs for _, attrs in page.tags)
    assert "<script>alert(1)</script> \"double\" 'single' & </style></svg> \ufffd[31mback" in (
        page.text()
    )
    for line in text.split("\n"):
        assert line.isprintable()


def test_a_run_that_is_not_over(tmp_path):
    path = write_run(tmp_path / "run", steps=17, finished=False)
    text = Page(make_report(read_run(path))).text()
    assert "The run is not over: these are the values after 17 of 30 steps." in text
    assert "17 of 30" in text


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_few_steps(tmp_path, steps, finished):
    path = write_run(tmp_path / "run", steps=steps, sets=("val",), finished=finished)
    text = Page(make_report(read_run(path))).text()
    assert "too few to tell" in text
    assert "with caution" in text or "cannot" in text
    assert "nan" not in re.findall(r"\w+", text)


def test_a_run_without_any_differences(tmp_path):
    path = write_run(tmp_path / "run", domains=("one",) * EXAMPLES, error=0.0, sets=("val",))
    assert "cannot" not in Page(make_report(read_run(path))).text()


def test_many_domains_and_kinds_of_values(tmp_path):
    domains = tuple(f"domain-{n}" for n in range(EXAMPLES))
    path = write_run(tmp_path / "run", domains=domains, changes={"domain-3:3": 5.0})
    text = Page(make_report(read_run(path))).text()
    assert f"Of {EXAMPLES} domains, the highest and lowest 4 are drawn." in text
    assert "all others" in text


def test_updates_that_rows_do_not_account_for_are_told(made_up, report, tmp_path):
    assert "The scores add up to" not in report
    path = write_run(tmp_path / "run", sets=("val",), memory=3.0)
    source = read_run(path)
    total = source.scores["score_val"].to_numpy().astype(float).sum()
    assert f"The scores add up to {number(total)}: " in make_report(source)


def test_warnings_of_the_summary_are_shown_once(tmp_path):
    path = write_run(tmp_path / "run", error=0.1, sets=("prose",))
    summary = read_json(path / "summary.json")
    own = judge_all(path)["prose"].reasons[0]
    summary["warnings"] = [own, "Something else is <odd>."]
    write_json(path / "summary.json", summary)
    text = Page(make_report(read_run(path))).text()
    assert text.count(own) == 1
    assert "Something else is <odd>." in text


def judge_all(path):
    source = read_run(path)
    return {
        name: judge(measure_fidelity(source, name, valued), source.end)
        for name, valued in read_values(source).items()
    }


def test_directories_that_cannot_be_used(tmp_path, capsys):
    assert "does not exist" in fails(["report", tmp_path / "none"], capsys)
    path = write_run(tmp_path / "run", steps=0, finished=False)
    before = files(path)
    assert "no steps in the log yet" in fails(["report", path], capsys)
    assert "--count must be at least 1" in fails(["report", path, "--count", "0"], capsys)
    assert files(path) == before


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path / "run")
    (path / "report.html").write_text("the last one")
    before = files(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["report", str(path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert files(path) == before


def test_help_has_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["report", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "ghostjax report run" in text
    for field in dataclasses.fields(ReportConfig):
        option = "no-windows" if field.name == "windows" else field.name
        assert field.name == "run" or "--" + option in text


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


def test_a_long_table_says_what_it_leaves_out(made_up, monkeypatch):
    monkeypatch.setattr("ghostjax.runs.report.page.MAX_LISTED", 3)
    text = make_report(read_run(made_up))
    assert len(listed(text)) == 6
    assert "6 of 40 examples: up to 3 of either end" in text
    assert "Left out are 34 between them and 0 not visited; values.parquet has all of them." in text


def test_steps_that_are_far_off_are_drawn_and_listed_with_their_weight(tmp_path):
    path = write_run(tmp_path / "run", sets=("val",))
    assert 'class="off"' not in make_report(read_run(path))
    changed_steps(path, 7, predicted_val=-9.0)
    text = make_report(read_run(path))
    assert text.count('class="off"') == 1
    assert "1 steps were far off their prediction, drawn as rings; the scores of 1 count" in text
    assert re.search(r'<th scope="row">7</th><td>[^<]*</td><td>[^<]*</td><td>0\.0', text)


@pytest.mark.parametrize(
    "columns",
    [
        ("correlation", "audit_error"),
        ("actual", "val_loss", "conservation_error", "correlation"),
        ("predicted", "actual", "val_loss", "conservation_error", "correlation", "error"),
    ],
    ids=" ".join,
)
def test_what_a_log_lacks_is_told(tmp_path, columns):
    source = read_run(write_run(tmp_path / "run", sets=("val",)))
    for name in ("scores", "steps"):
        table = getattr(source, name)
        for n, field in enumerate(table.schema):
            if field.name.removesuffix("_val") in columns and field.name.endswith("_val"):
                table = table.set_column(n, field, pa.nulls(len(table), field.type))
        source.__dict__[name] = table  # where the property keeps it
    text = Page(make_report(source)).text()
    assert "nan" not in re.findall(r"\w+", text.split("What the colours mean")[1])
    told = {"actual": "actual decreases", "error": "standard errors", "val_loss": "losses on the"}
    told |= {"correlation": "correlations with plain", "conservation_error": "certificate"}
    for column, words in told.items():
        assert (f"The log has no {words}" in text) == (column in columns)
