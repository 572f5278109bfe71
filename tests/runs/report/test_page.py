"""The page says what the log has, by itself, for everyone, and nothing else."""

import base64
import hashlib
import re
from itertools import pairwise

import pyarrow as pa
import pytest

from ghostjax.runs.analysis.judgement import judge
from ghostjax.runs.analysis.scale import Scale, number
from ghostjax.runs.analysis.summary import measure_fidelity
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.files import read_json, write_json
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import DOMAINS, EXAMPLES, KINDS, SETS, STEPS, changed_steps, write_run
from tests.runs.report.parsed import HOSTILE, Page


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("html") / "run")


@pytest.fixture(scope="module")
def report(made_up):
    return make_report(read_run(made_up))


@pytest.fixture(scope="module")
def page(report):
    return Page(report)


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
