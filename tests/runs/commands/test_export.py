"""Subsets of the training examples: which are kept, their weights, and files that are whole."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ghostjax import selection
from ghostjax.cli import main
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.data.documents import read_documents
from ghostjax.runs.data.shards import Fields
from ghostjax.runs.store.run import read_run
from tests.runs.checks import fails, files
from tests.runs.made_up import EXAMPLES, write_run


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("export") / "run", steps=63)


def exported(path, out, *options):
    assert main(["export", str(path), "--out", str(out), *map(str, options)]) == 0
    if out.suffix == ".parquet":
        return pq.read_table(out).to_pylist()
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_those_of_the_run_in_its_order(made_up, tmp_path, capsys, suffix):
    before = files(made_up)
    out = tmp_path / f"kept.{suffix}"
    rows = exported(made_up, out, "--set", "prose", "--drop", "hurts")
    valued = read_values(read_run(made_up))["prose"]
    kept = valued.select(valued.verdicts != "hurts")
    assert 0 < len(rows) < EXAMPLES
    assert [row["id"] for row in rows] == list(kept.ids)
    assert [row["value"] for row in rows] == list(kept.values)
    assert {row["weight"] for row in rows} == {1.0}
    assert capsys.readouterr().out == f"{out}: {len(rows)} of {EXAMPLES} examples\n"
    assert files(made_up) == before


@pytest.mark.slow
def test_top_keeps_the_best_of_what_is_left(made_up, tmp_path):
    ranked = read_values(read_run(made_up))["code"].ranked()
    wiki = [name for name in ranked.ids if name.startswith("wiki")]
    for top, options, best in (
        ("0.25", [], ranked.ids[:10]),
        ("7", [], ranked.ids[:7]),
        ("0.5", ["--domain", "wiki"], wiki[: -(-len(wiki) // 2)]),
    ):
        out = tmp_path / "best.jsonl"
        rows = exported(made_up, out, "--set", "code", "--top", top, "--force", *options)
        assert {row["id"] for row in rows} == set(best)


def test_softmax_weights_are_those_of_selection(made_up, tmp_path):
    options = ["--set", "prose", "--weights", "softmax", "--temperature", "2"]
    rows = exported(made_up, tmp_path / "soft.parquet", *options)
    values = read_values(read_run(made_up))["prose"].values
    expected = np.asarray(selection.softmax(np.float32(values), 2.0))
    np.testing.assert_array_equal([row["weight"] for row in rows], expected)
    assert np.mean(expected) == pytest.approx(1, rel=1e-5)


def test_what_was_not_visited_has_no_value_and_no_rank(tmp_path):
    path = write_run(tmp_path / "run", steps=3, finished=False)
    rows = exported(path, tmp_path / "all.jsonl", "--set", "prose")
    assert len(rows) == EXAMPLES
    assert [row["value"] for row in rows].count(None) == EXAMPLES - 24
    for options in (["--top", "1.0"], ["--weights", "softmax"]):
        rows = exported(path, tmp_path / "some.parquet", "--set", "prose", "--force", *options)
        assert len(rows) == 24


@pytest.mark.slow
def test_documents_can_be_trained_on_again(micro_run, tmp_path):
    out = tmp_path / "again.jsonl"
    exported(micro_run.path, out, "--set", "held", "--top", "6", "--documents")
    found = read_documents([out], Fields("text", "id", "domain"))
    assert len(found) == 6
    texts = {document.id: document.text.decode() for document in found}
    for name, text in texts.items():
        stem, number = name.split(":")
        whole = f"line {number} of the forum, " * (int(number) + 1)
        assert text == (whole if stem == "forum" else f"block {number}\nof the wiki")


BAD = {
    "no file": ([], "--out: give the file to write"),
    "suffix": (["--out", "a.csv"], "--out a.csv: expected a .jsonl or .parquet file"),
    "set": (["--out", "a.jsonl"], "--set: give one of prose, code, whose values decide"),
    "top": (["--out", "a.jsonl", "--top", "1.5"], "--top 1.5: expected a fraction above 0 and up"),
    "top of none": (["--out", "a.jsonl", "--top", "0"], "--top 0: expected a fraction"),
    "top word": (["--out", "a.jsonl", "--top", "all"], "--top all: expected a fraction"),
    "temperature": (["--out", "a.jsonl", "--temperature", "0"], "--temperature must be positive"),
    "unique": (["--out", "a.jsonl", "--unique", "0.5"], "--unique must be from 0.6 to 1, got 0.5"),
    "nothing": (
        ["--out", "a.jsonl", "--set", "prose", "--min-visits", "99"],
        "none of 40 examples is left to be written",
    ),
    "no data": (
        ["--out", "a.jsonl", "--set", "prose", "--unique", "0.8"],
        "the data changed since the run began",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_used(made_up, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(["export", made_up, *options], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_unless_forced(made_up, tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    out.write_text("mine")
    message = fails(["export", made_up, "--out", out, "--set", "prose"], capsys)
    assert f"{out} is there already: --force replaces it" in message
    assert out.read_text() == "mine"
    assert len(exported(made_up, out, "--set", "prose", "--force")) == EXAMPLES


def test_arrays_have_no_documents(tmp_path, capsys, monkeypatch, made_up):
    monkeypatch.setattr("ghostjax.runs.commands.export.read_task", lambda source: (None, None))
    options = ["--out", tmp_path / "a.jsonl", "--set", "prose", "--documents"]
    assert "is no run on texts" in fails(["export", made_up, *options], capsys)
