"""Groups of near-duplicates in a run, where they are known."""

import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import RunLog, Task
from ghostjax.cli import main
from ghostjax.runs.analysis.duplicates import jaccard
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.data.own import OwnTask
from ghostjax.runs.store.run import read_run
from tests.runs.checks import fails, files
from tests.runs.made_up import write_run

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

LINE = "the river rises in the hills north of the town and is joined by two streams, "
TEXTS = [
    LINE + "the one of which is dry",
    "nothing like the others at all, said the miller to his daughter one day",
    LINE.upper() + "the one  of which is DRY",
    LINE + "the one of which is wet",
    "def window(rows, size): return [rows[n : n + size] for n in range(len(rows))]",
    "def window(rows, size): return [rows[n : n + size] for n in range(len(rows))]",
]
GROUPS = [["d:0", "d:2", "d:3"], ["d:4", "d:5"]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("duplicates")
    (folder / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(f"held out, {name}\n\nand one more")
    data = ["--train", folder / "d.jsonl"]
    data += ["--val", *(f"{name}={folder / name}.txt" for name in ("one", "two"))]
    model = [
        "--model",
        "micro",
        "--steps",
        "2",
        *("--mesh", "data=1"),
        "--batch-size",
        "2",
        "--val-batch-size",
        "2",
        "--order",
        "1",
        "--quiet",
    ]
    with jax.numpy_dtype_promotion("standard"):
        assert main(["train", "--out", *map(str, [folder / "run", *data, *model]), "--quiet"]) == 0
    return folder / "run"


def listed(path, capsys, *options):
    assert main(["duplicates", str(path), *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_groups_and_their_values(path, capsys):
    before, values = files(path), read_values(read_run(path))
    rows = json.loads(listed(path, capsys, "--json"))
    for name, valued in values.items():
        own = [row for row in rows if row["set"] == name]
        groups = [[row["id"] for row in own if row["group"] == n] for n in (1, 2)]
        assert groups == GROUPS
        visited = dict(zip(valued.ids, valued.visits))
        by_id = dict(zip(valued.ids, valued.values))
        for row in own:
            members = GROUPS[row["group"] - 1]
            known = [by_id[member] for member in members if visited[member]]
            expected = pytest.approx(sum(known)) if known else None
            assert (row["size"], row["group_value"]) == (len(members), expected)
            assert row["visits"] == visited[row["id"]]
            assert row["value"] == (by_id[row["id"]] if row["visits"] else None)
    alike = [row["similarity"] for row in rows if row["set"] == "one"]
    assert (alike[0], alike[1], alike[3], alike[4]) == (1, 1, 1, 1)
    assert 0.9 < alike[2] < 1
    table = list(csv.DictReader(io.StringIO(listed(path, capsys, "--csv"))))
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    assert files(path) == before


def test_tables_options_and_what_is_told(path, capsys):
    out = " ".join(listed(path, capsys).split())
    first, second = out.split("Group 1: 3 examples")[1].split("Group 2: 2 examples")
    assert [name in first for name in ("d:0", "d:2", "d:3", "d:4")] == [True, True, True, False]
    assert "value: one" in second
    assert "value: two" in second
    assert "Of 6 examples, 5 are in 2 groups of examples that are alike to 0.8 or more" in out
    assert "with one of each group, 3 would be left out" in out

    exact = json.loads(listed(path, capsys, "--json", "--similarity", "1", "--set", "two"))
    assert [row["id"] for row in exact] == ["d:0", "d:2", "d:4", "d:5"]
    some = listed(path, capsys, "--id", "d:0", "d:4", "d:5", "--count", "1", "--set", "two")
    assert "Group 1: 2 examples" in some
    assert "Of 3 examples of id d:0 or d:4 or d:5, 2 are in 1 group of" in " ".join(some.split())
    none = listed(path, capsys, "--id", "d:0", "d:1")
    assert "Of 2 examples of id d:0 or d:1, none are alike to 0.8 or more." in none
    assert listed(path, capsys, "--csv", "--id", "d:1").startswith("set,group,size,group_value,id")
    assert json.loads(listed(path, capsys, "--json", "--id", "d:1")) == []
    assert "would be left out" not in listed(path, capsys, "--quiet")


def test_export_keeps_the_best_of_each_group(path, tmp_path, capsys):
    values = {name: dict(zip(v.ids, v.values)) for name, v in read_values(read_run(path)).items()}
    for name, by_id in values.items():
        out = tmp_path / f"{name}.jsonl"
        options = ["--unique", "0.8", "--set", name, "--documents", "--out", str(out)]
        assert main(["export", str(path), *options]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert told.endswith(f"{name}.jsonl: 3 of 6 examples, without 3 near-duplicates")
        kept = {row["id"]: row["text"] for row in map(json.loads, out.read_text().splitlines())}
        best = [
            max(group, key=lambda one: np.nan_to_num(by_id[one], nan=-np.inf)) for group in GROUPS
        ]
        assert list(kept) == sorted(["d:1", *best])
        assert list(kept.values()) == [TEXTS[int(one[2:])] for one in kept]
    # What was left out before is in no group.
    options = ["--unique", "1", "--set", "one", "--id", "d:[1-4]", "--out", str(out), "--force"]
    assert main(["export", str(path), *options]) == 0
    assert capsys.readouterr().out.endswith("4 of 6 examples\n")


def test_large_groups_are_cut_in_tables_only(path, capsys, monkeypatch):
    monkeypatch.setattr("ghostjax.runs.commands.duplicates.MAX_MEMBERS", 2)
    out = listed(path, capsys)
    assert "and 1 more, which --csv has; value of the group: one" in " ".join(out.split())
    assert "d:3" not in out


def test_examples_of_a_task_of_ones_own_are_alike_by_their_numbers():
    x = np.eye(3, 10, dtype=np.float32) + np.arange(10)
    x[2] = x[0]
    x[2, 9] = 0.5
    task = OwnTask(
        Task(
            train=[{"id": f"n{n}", "x": own} for n, own in enumerate(x)],
            val={"val": [{"x": x[0]}]},
            init=lambda seed: {"w": jnp.zeros(10)},
            row_losses=lambda params, batch: batch["x"] @ params["w"],
        )
    )
    assert jaccard(task.elements(0), task.elements(2)) == 9 / 11
    assert jaccard(task.elements(0), task.elements(1)) == 8 / 12


BAD = {
    "similarity": (
        ["--similarity", "0.5"],
        "--similarity must be from 0.6 to 1, got 0.5: of pairs",
    ),
    "above": (["--similarity", "1.5"], "--similarity must be from 0.6 to 1, got 1.5"),
    "set": (["--set", "poems"], "no validation set 'poems' in the run"),
    "count": (["--count", "0"], "--count must be at least 1, got 0"),
    "formats": (["--csv", "--json"], "--csv and --json exclude each other"),
    "data": ([], "the data changed since the run began"),
}


@pytest.mark.quick("similarity", "above", "set", "count", "formats")
@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_used(tmp_path, capsys, options, message):
    assert message in fails(["duplicates", write_run(tmp_path / "run"), *options], capsys)


def test_the_log_of_another_loop_has_no_data(tmp_path, capsys):
    with RunLog(tmp_path / "own") as log:
        log.add(0, ["a"], [1.0])
    message = fails(["duplicates", tmp_path / "own"], capsys)
    assert "is the log of another training loop, which has the data" in message
