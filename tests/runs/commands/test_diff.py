import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from ghostjax.cli import main
from ghostjax.runs.analysis.compare import compare
from ghostjax.runs.analysis.values import Valued
from ghostjax.runs.commands.diff import DiffConfig
from tests.runs.checks import fails, files
from tests.runs.made_up import EXAMPLES, SETS, write_run

CHANGED = "wiki:0"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs that differ by noise, but for one example."""
    folder = tmp_path_factory.mktemp("diff")
    a = write_run(folder / "a", seed=1, steps=60)
    b = write_run(folder / "b", seed=2, steps=60, changes={CHANGED: -0.02})
    return str(a), str(b)


def printed(argv, capsys) -> str:
    assert main(["diff", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in out.split("\n"):
        assert line.isprintable(), line
    return out


def valued(ids, values, errors, visits=None) -> Valued:
    count = len(ids)
    texts = np.array(list(ids), object)
    visits = np.full(count, 8) if visits is None else np.array(visits)
    values, errors = np.array(values, float), np.array(errors, float)
    # All visits have errors of one size.
    fourths = errors**4 / np.maximum(visits, 1)
    return Valued(texts, texts, texts, visits, values, errors, fourths)


def test_comparison_by_hand():
    a = valued("abcdx", [4, 1, -1, -5, 9], [0.1, 1, 1, 0.1, 1])
    b = valued("dcbay", [5, 1, 2, 4.05, 9], [0.1, 1, 1, 0.1, 1])
    found = compare(a, b)
    assert list(found.a.ids) == list(found.b.ids) == ["a", "b", "c", "d"]
    np.testing.assert_allclose(found.change, [0.05, 1, 2, 10])
    np.testing.assert_allclose(found.error, np.sqrt([0.02, 2, 2, 0.02]))
    assert found.beyond.tolist() == [False, False, False, True]
    assert found.sign_changed.tolist() == [False, False, True, True]
    assert found.rank_a.tolist() == [1, 2, 3, 4]
    assert found.rank_b.tolist() == [2, 3, 4, 1]
    assert found.largest().tolist() == [3, 2, 1, 0]
    assert list(found.only_a.ids) == ["x"]
    assert list(found.only_b.ids) == ["y"]
    summary = found.summary()
    assert summary.pop("correlation") == pytest.approx(-0.2)
    assert 0 < summary.pop("expected_correlation") < 1
    assert summary == {
        "compared": 4,
        "only_a": 1,
        "only_b": 1,
        "unvisited": 0,
        "told": 4,
        "changed_beyond_errors": 1,
        "sign_changed": 2,
        "sign_changed_beyond_errors": 1,
        "rank_changed": 4,
        "rank_changed_beyond_errors": 1,
        "median_rank_change": 1,
    }


def test_what_one_run_did_not_visit_is_not_compared():
    found = compare(valued("ab", [1, 2], [0, 0]), valued("ab", [1, 0], [0, 0], visits=[1, 0]))
    assert list(found.a.ids) == ["a"]
    assert list(found.only_a.ids) == ["b"]
    assert len(found.only_b) == 0
    assert list(found.missing_b) == ["not visited"]
    neither = valued("ab", [1, 0], [0, 0], visits=[1, 0])
    assert compare(neither, neither).unvisited == ["b"]


def test_nothing_is_claimed_of_few_visits():
    a, b = (valued("ab", [0, sign], [1e-3] * 2, visits=[7, 8]) for sign in (1, -1))
    c = valued("ab", [9, 1], [1e-3] * 2, visits=[9, 9])
    assert compare(a, b).beyond.tolist() == [False, True]
    assert compare(a, c).is_told.tolist() == [False, True]
    assert compare(a, c).beyond.tolist() == [False, False]


def test_values_per_visit_are_compared_by_mean():
    a, b = valued("a", [4], [2], visits=[4]), valued("a", [1], [1], visits=[1])
    found = compare(a, b, by="mean")
    assert found.change.tolist() == [0]
    np.testing.assert_allclose(found.error, np.hypot(0.5, 1))


def test_an_exact_change_is_beyond_its_errors():
    found = compare(valued("ab", [1, 2], [0, 0]), valued("ab", [1, 3], [0, 0]))
    assert found.beyond.tolist() == [False, True]
    assert found.largest().tolist() == [1, 0]


def test_a_run_does_not_differ_from_itself(two, capsys):
    out = printed([two[0], two[0]], capsys)
    assert "rank correlation 1.000" in out
    assert "0 changed sign: 0 within the error bars, 0 beyond" in out
    assert "0 changed rank: 0 within the error bars, 0 beyond" in out
    assert "No value changed beyond its error bars." in out
    assert "differ in" not in out


def test_what_changed_beyond_the_errors_is_told_from_noise(two, capsys):
    figures = json.loads(printed([*two, "--json"], capsys))
    assert figures["differing_fingerprints"] == ["params"]
    for name in SETS:
        found = figures["sets"][name]
        assert found["compared"] == EXAMPLES == len(found["examples"])
        first = found["examples"][0]
        assert first["id"] == CHANGED
        assert first["sign_changed"]
        assert first["beyond_errors"]
        # The rest is noise, of which a twentieth is beyond the error bars.
        assert found["changed_beyond_errors"] <= 1 + 0.2 * EXAMPLES
        assert found["correlation"] > 0.8

    out = printed(two, capsys)
    table = out.split("beyond the error bars")[1]
    assert CHANGED in table
    assert "changed" in table
    assert "The runs differ in their initial parameters." in out


def test_csv_has_the_rows_of_json(two, capsys):
    rows = list(csv.DictReader(io.StringIO(printed([*two, "--csv"], capsys))))
    figures = json.loads(printed([*two, "--json"], capsys))
    examples = [row for found in figures["sets"].values() for row in found["examples"]]
    assert len(rows) == len(examples)
    for row, example in zip(rows, examples):
        assert row["id"] == example["id"]
        for name in ("value_a", "error_a", "value_b", "error_b", "change", "change_error"):
            assert float(row[name]) == example[name]
        assert row["beyond_errors"] == str(example["beyond_errors"])


def test_options_choose(two, capsys):
    text = printed([*two, "--csv", "--set", "code", "--domain", "wiki", "--count", "3"], capsys)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 3
    assert {row["set"] for row in rows} == {"code"}
    assert {row["domain"] for row in rows} == {"wiki"}
    assert "followed by its standard error" not in printed([*two, "--quiet"], capsys)


def test_other_data_other_examples_and_other_sets_are_said(two, tmp_path, capsys):
    ids = tuple(f"new:{n}" if n < 2 else f"wiki:{n}" for n in range(EXAMPLES))
    other = write_run(
        tmp_path / "c",
        ids=ids,
        domains=("wiki",) * EXAMPLES,
        sets=("prose", "poems"),
        steps=20,
        finished=False,
        fingerprints={"data": "another", "params": "made-up 1"},
    )
    out = printed([two[0], other], capsys)
    assert "The runs differ in their data." in out
    assert "Only A has the validation sets: code." in out
    assert "Only B has the validation sets: poems." in out
    assert "The run is not over: these are the values after 20 of 30 steps." in out
    assert "only in A (scripts:1, noise:2" in out.replace("wiki:0, ", "")
    assert "only in B (new:0, new:1, wiki:" in out

    rows = list(csv.DictReader(io.StringIO(printed([two[0], other, "--csv"], capsys))))
    alone = next(row for row in rows if row["id"] == "new:0")
    assert alone["value_a"] == alone["change"] == alone["rank_b"] == ""
    assert float(alone["value_b"])


def test_runs_that_cannot_be_compared(two, tmp_path, capsys):
    other = write_run(tmp_path / "sets", sets=("poems",))
    message = fails(["diff", two[0], other], capsys)
    assert "the runs share no validation set: prose, code in A, poems in B" in message
    strangers = write_run(tmp_path / "ids", ids=tuple(f"n{n}" for n in range(EXAMPLES)))
    assert "share no example" in fails(["diff", two[0], strangers], capsys)
    assert "does not exist" in fails(["diff", two[0], tmp_path / "none"], capsys)
    assert "no validation set 'x'" in fails(["diff", *two, "--set", "x"], capsys)
    assert "no domain 'x'" in fails(["diff", *two, "--domain", "x"], capsys)
    assert "--count must be" in fails(["diff", *two, "--count", "-1"], capsys)
    assert "exclude each other" in fails(["diff", *two, "--csv", "--json"], capsys)


def test_comparing_changes_nothing(two, tmp_path, capsys):
    a = write_run(tmp_path / "a")
    before = files(a)
    printed([a, two[1]], capsys)
    assert files(a) == before


def test_names_of_directories_cannot_forge_output(two, tmp_path, capsys):
    hostile = write_run(tmp_path / "a\x1b[31m\nb")
    # Lines are wrapped where the blank is if the path is long.
    assert "a\ufffd[31m b" in " ".join(printed([hostile, two[1]], capsys).split())


def test_help_has_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["diff", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "ghostjax diff run-a run-b --set prose --by mean" in text
    for field in dataclasses.fields(DiffConfig):
        assert field.name.startswith("run_") or "--" + field.name in text
