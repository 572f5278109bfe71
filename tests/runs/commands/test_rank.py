import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ghostjax import RunLog
from ghostjax.cli import main
from ghostjax.runs.analysis.values import best_and_worst, read_values
from ghostjax.runs.commands.rank import RankConfig, run
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store import run as store_run
from ghostjax.runs.store import schema
from ghostjax.runs.store.files import write_table
from ghostjax.runs.store.run import read_run
from tests.runs.checks import fails, files
from tests.runs.made_up import DOMAINS, EXAMPLES, SETS, write_run


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("rank") / "run")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """With visits enough to tell, of some examples one more."""
    return write_run(tmp_path_factory.mktemp("rank") / "long", steps=63)


def ranked(path: Path, capsys, *options: str) -> str:
    """What ``ghostjax rank`` prints."""
    assert main(["rank", str(path), *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def rows_of_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_and_json_hold_every_example_with_all_digits(made_up, capsys):
    values = read_values(read_run(made_up))
    for rows in (
        rows_of_csv(ranked(made_up, capsys, "--csv")),
        json.loads(ranked(made_up, capsys, "--json")),
    ):
        assert len(rows) == len(SETS) * EXAMPLES
        for name in SETS:
            own = [row for row in rows if row["set"] == name]
            found = {row["id"]: (float(row["value"]), float(row["error"])) for row in own}
            valued = values[name]
            assert found == {i: (v, e) for i, v, e in zip(valued.ids, valued.values, valued.errors)}
            assert [int(row["rank"]) for row in own] == [*range(1, EXAMPLES + 1)]
            descending = [float(row["value"]) for row in own]
            assert descending == sorted(descending, reverse=True)
            for row in own:
                assert float(row["mean"]) * int(row["visits"]) == pytest.approx(float(row["value"]))


def test_values_are_those_of_values_parquet(made_up):
    table = pq.read_table(made_up / "values.parquet")
    for name, valued in read_values(read_run(made_up)).items():
        np.testing.assert_allclose(valued.values, table[f"value_{name}"])
        np.testing.assert_allclose(valued.errors, table[f"error_{name}"])


def test_options_choose_set_domain_count_and_order(made_up, capsys):
    rows = rows_of_csv(ranked(made_up, capsys, "--csv", "--set", "code", "--domain", "noise"))
    assert {row["set"] for row in rows} == {"code"}
    assert {row["domain"] for row in rows} == {"noise"}
    assert len(rows) == sum(n % 3 == 2 for n in range(EXAMPLES))

    rows = rows_of_csv(ranked(made_up, capsys, "--csv", "--set", "prose", "--count", "2"))
    assert [row["rank"] for row in rows] == ["1", "2", str(EXAMPLES - 1), str(EXAMPLES)]

    rows = rows_of_csv(ranked(made_up, capsys, "--csv", "--set", "prose", "--by", "mean"))
    means = [float(row["mean"]) for row in rows]
    assert means == sorted(means, reverse=True)


FILTERS = {
    "id": (["--id", "wiki:*", "noise:?"], lambda row: re.match(r"wiki:|noise:.$", row["id"])),
    "whole id": (["--id", "wiki:3"], lambda row: row["id"] == "wiki:3"),
    "text": (["--text", "DEF w|^xq"], lambda row: row["domain"] in ("scripts", "noise")),
    "visits": (["--min-visits", "13"], lambda row: int(row["visits"]) == 13),
    "verdict": (["--verdict", "helps", "hurts"], lambda row: row["verdict"] in ("helps", "hurts")),
    "all": (
        ["--domain", "wiki", "--verdict", "helps", "--id", "*:3*"],
        lambda row: row["verdict"] == "helps" and row["id"].startswith("wiki:3"),
    ),
}


@pytest.mark.parametrize(("options", "fits"), FILTERS.values(), ids=FILTERS)
def test_filters_choose_what_fits_all_of_them(long, capsys, options, fits):
    path, every = long, ["--csv", "--set", "prose"]
    expected = [row["id"] for row in rows_of_csv(ranked(path, capsys, *every)) if fits(row)]
    rows = rows_of_csv(ranked(path, capsys, *every, *options))
    assert [row["id"] for row in rows] == expected
    assert 0 < len(rows) < EXAMPLES
    assert [int(row["rank"]) for row in rows] == [*range(1, len(rows) + 1)]
    assert "By domain" not in ranked(path, capsys, *options)


@pytest.mark.parametrize(("by", "form"), [("loss", ".3f"), ("norm", ".2e")])
def test_by_loss_and_norm_list_those_of_the_visits(made_up, capsys, by, form):
    scores = read_run(made_up).scores.to_pylist()
    rows = json.loads(ranked(made_up, capsys, "--by", by, "--json", "--set", "prose"))
    for row in rows:
        own = [visit[by] for visit in scores if visit["id"] == row["id"]]
        assert row[by] == pytest.approx(np.mean(own), rel=1e-6)
        assert (row[f"first_{by}"], row[f"last_{by}"]) == (own[0], own[-1])
    found = [row[by] for row in rows]
    assert found == sorted(found, reverse=True)

    highest, lowest = ranked(made_up, capsys, "--by", by, "--domain", "wiki").split("Lowest")
    own = [row for row in rows if row["domain"] == "wiki"]
    assert f"Highest {by}, mean over visits, domain wiki" in highest
    for text, row in ((highest, own[0]), (lowest, own[-1])):
        assert row["id"] in text
        assert f"{row[by]:{form}}" in text


def test_a_mean_norm_is_of_the_visits_that_have_one(tmp_path, capsys):
    with RunLog(tmp_path / "run") as log:
        log.add(0, ["a", "b"], [1.0, 1.0], norms=[3.0, 2.0])
        log.add(1, ["a", "c"], norms=[5.0, 9.0], losses=[1.0, 1.0])
        log.add(2, ["a", "b"], [1.0, 1.0])
    rows = json.loads(ranked(tmp_path / "run", capsys, "--by", "norm", "--json"))
    assert [(row["id"], row["norm"], row["visits"]) for row in rows] == [
        *(("c", 9, 0), ("a", 4, 2), ("b", 2, 2)),
    ]


def test_a_log_from_before_there_were_norms_is_read_and_has_none(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    values = ranked(path, capsys, "--csv")
    for part in (path / "log").glob("*.parquet"):
        table = part.name.partition("-")[0]
        fields = schema.table_schema(table, SETS, version=2)
        write_table(part, pq.read_table(part).select(fields.names).cast(fields))
    rows, before = (rows_of_csv(text) for text in (ranked(path, capsys, "--csv"), values))
    norms = ("norm", "first_norm", "last_norm")
    assert rows == [{**row, **dict.fromkeys(norms, "")} for row in before]
    message = fails(["rank", path, "--by", "norm"], capsys)
    assert f"--by norm: the log of {path} has no norms of gradients: train with --norms" in message


@pytest.mark.slow
def test_a_log_that_is_read_in_parts_says_the_same(made_up, capsys, monkeypatch):
    def told():
        argv = ["show", str(made_up), "wiki:0", "--json", "--quiet"]
        assert main(argv) == 0
        shown = capsys.readouterr().out
        return shown, ranked(made_up, capsys, "--csv"), make_report(read_run(made_up))

    whole = told()
    monkeypatch.setattr(store_run, "SMALL", -1)
    monkeypatch.setattr(store_run, "ROW_GROUP", 1)
    run = read_run(made_up)
    assert [len(some["step"]) for some in run.visits("loss")] == [16 * 8, 14 * 8]
    assert not {"scores", "examples"} & run.__dict__.keys()
    assert told() == whole


def test_no_example_is_at_both_ends(made_up, capsys):
    text = ranked(made_up, capsys, "--csv", "--set", "prose", "--count", "30")
    names = [row["id"] for row in rows_of_csv(text)]
    assert len(names) == len(set(names)) == EXAMPLES


def test_tables_name_the_best_the_worst_and_the_domains(made_up, capsys):
    out = ranked(made_up, capsys)
    valued = read_values(read_run(made_up))["prose"].ranked()
    helpful, rest = out.split("Most harmful: validation set prose")
    harmful = rest.split("By domain: validation set prose")[0]
    assert "Most helpful: validation set prose" in helpful
    assert "Most helpful: validation set code" in rest
    assert f"{valued.values[0]:+.2e} ± {valued.errors[0]:.1e}" in helpful
    assert f"{valued.values[-1]:+.2e} ± {valued.errors[-1]:.1e}" in harmful
    assert valued.ids[0] in helpful
    assert valued.ids[-1] in harmful
    assert valued.ids[0] not in harmful
    for domain in DOMAINS:
        assert domain in rest
    assert "Of 0 examples with 8 visits or more, 0 differ from zero by a t test at 5%" in out
    assert "40 have fewer visits, too few to tell. Not visited, so without a value: 0." in out
    assert "in nats per token" in out

    quiet = ranked(made_up, capsys, "--quiet")
    assert "Most helpful: validation set prose" in quiet
    assert "standard error" not in quiet


def test_by_domain_sums_up_what_the_rows_say(made_up, capsys):
    rows = rows_of_csv(ranked(made_up, capsys, "--csv", "--set", "prose"))
    own = [float(row["value"]) for row in rows if row["domain"] == "wiki"]
    table = ranked(made_up, capsys, "--set", "prose").split("By domain")[1]
    line = next(line for line in table.splitlines() if "wiki" in line)
    for figure in (f"{sum(own):+.2e}", f"{np.mean(own):+.2e}", f"{np.median(own):+.2e}"):
        assert figure in line


def test_of_many_domains_the_best_are_printed(tmp_path, capsys):
    path = write_run(tmp_path / "run", domains=tuple(f"d{n}" for n in range(EXAMPLES)))
    table = ranked(path, capsys, "--set", "prose").split("By domain")[1]
    assert "and 20 more domains with lower means" in table
    best = read_values(read_run(path))["prose"].ranked().domains[:20]
    rows = [line.split()[1] for line in table.splitlines() if " d" in line and "│" in line]
    assert rows == list(best)


def test_titles_do_not_claim_what_is_not_so():
    def titles(*values):
        return {title: list(n) for title, n in best_and_worst(np.array(values, float), 2)}

    assert titles(3, 2, 1) == {"Most helpful": [0, 1], "Least helpful, as none hurt": [2]}
    assert titles(-1, -2, -3) == {
        "Least harmful, as none helped": [0],
        "Most harmful": [2, 1],
    }
    assert titles(2, -1) == {"Most helpful": [0], "Most harmful": [1]}
    assert titles(0) == {"Least harmful, as none helped": [0]}


def test_examples_without_a_visit_come_last_and_have_no_rank(tmp_path, capsys):
    path = write_run(tmp_path / "run", steps=3, finished=False)
    rows = [row for row in json.loads(ranked(path, capsys, "--json")) if row["set"] == "prose"]
    assert len(rows) == EXAMPLES
    visited = [row for row in rows if row["visits"]]
    assert rows[: len(visited)] == visited
    assert len(visited) == 24
    assert {row["rank"] for row in rows[len(visited) :]} == {None}
    assert {row["mean"] for row in rows[len(visited) :]} == {None}
    assert {row["value"] for row in rows[len(visited) :]} == {None}
    assert {row["verdict"] for row in visited} == {"few visits"}
    assert {row["verdict"] for row in rows[len(visited) :]} == {"not visited"}
    cells = rows_of_csv(ranked(path, capsys, "--csv"))[EXAMPLES - 1]
    assert (cells["rank"], cells["visits"], cells["mean"]) == ("", "0", "")

    out = ranked(path, capsys)
    assert "The run is not over: these are the values after 3 of 30 steps." in out
    assert "Not visited, so without a value: 16 (" in out


HOSTILE = {
    0: "\x1b[31mred\x1b[0m\r\n[bold]text[/bold] \x9b5m \u202eevil\u200b",
    1: '=HYPERLINK("http://x"), "quoted", plain',
}


def test_texts_cannot_forge_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    ids = ("a\x1b]0;title\x07", "+b,\n", *(f"c{n}" for n in range(EXAMPLES - 2)))
    path = write_run(tmp_path / "run", excerpts=HOSTILE, ids=ids)
    for options in ([], ["--csv"], ["--json"]):
        out = ranked(path, capsys, "--count", str(EXAMPLES), *options)
        for line in out.split("\n"):
            assert line.isprintable(), line
    assert json.loads(ranked(path, capsys, "--json"))[0]["id"]
    by_id = {row["id"]: row for row in json.loads(ranked(path, capsys, "--json"))}
    assert by_id[ids[0]]["excerpt"] == HOSTILE[0]
    rows = rows_of_csv(ranked(path, capsys, "--csv"))
    assert {row["id"] for row in rows} >= {"a\ufffd]0;title\ufffd", "+b, "}
    assert HOSTILE[1] in {row["excerpt"] for row in rows}


def test_markup_in_excerpts_is_text(tmp_path, capsys):
    path = write_run(tmp_path / "run", excerpts=dict.fromkeys(range(EXAMPLES), "[bold]x[/bold]"))
    assert "[bold]x[/bold]" in ranked(path, capsys)


@pytest.mark.slow
def test_a_stream_that_is_not_unicode_gets_what_it_can_hold(tmp_path, made_up):
    path = write_run(tmp_path / "run", excerpts=dict.fromkeys(range(EXAMPLES), "schön" * 99))
    done = subprocess.run(
        [sys.executable, "-m", "ghostjax", "rank", str(path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"sch?n" in done.stdout
    assert b"+-" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(made_up):
    process = subprocess.Popen(
        [sys.executable, "-m", "ghostjax", "rank", str(made_up), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


BAD = {
    "set": (["--set", "poems"], "no validation set 'poems' in the run: expected one of prose, c"),
    "domain": (["--domain", "x"], "no domain 'x' in the run: expected one of noise, scripts, wiki"),
    "id": (["--id", "poem:*", "x"], "--id: no example has an id like poem:* or x"),
    "text": (["--text", "("], "--text '(': no regular expression, missing )"),
    "visits": (["--min-visits", "-1"], "--min-visits must be at least 0, got -1"),
    "none left": (["--min-visits", "99"], "none of the examples of 99 visits or more was visited"),
    "mixture": (["--mixture", "x", "--text", "a"], "--mixture is of all examples: leave out what "),
    "count": (["--count", "0"], "--count must be at least 1, got 0"),
    "formats": (["--csv", "--json"], "--csv and --json exclude each other"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_used(made_up, capsys, options, message):
    before = files(made_up)
    assert message in fails(["rank", made_up, *options], capsys)
    assert files(made_up) == before


def test_directories_that_cannot_be_used(tmp_path, capsys):
    assert "none does not exist" in fails(["rank", tmp_path / "none"], capsys)
    assert "not a run directory" in fails(["rank", tmp_path], capsys)
    path = write_run(tmp_path / "run", steps=0, finished=False)
    assert "no steps in the log yet" in fails(["rank", path], capsys)
    assert "is not a directory" in fails(["rank", path / "run.json"], capsys)
    (path / "examples.parquet").write_bytes(b"PAR1")
    path = write_run(tmp_path / "broken")
    (path / "examples.parquet").write_bytes(b"PAR1")
    assert "examples.parquet cannot be read" in fails(["rank", path], capsys)


def test_ranking_changes_nothing(made_up, capsys):
    before = files(made_up)
    ranked(made_up, capsys)
    assert files(made_up) == before


def test_help_has_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["rank", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "ghostjax rank run --set prose --domain wiki --count 5" in text
    for field in dataclasses.fields(RankConfig):
        assert field.name == "run" or "--" + field.name.replace("_", "-") in text
    assert "\x1b" not in text


def test_run_is_a_function_of_its_options(made_up, capsys):
    run(RankConfig(made_up, set="prose", count=1, json=True))
    assert len(json.loads(capsys.readouterr().out)) == 2
