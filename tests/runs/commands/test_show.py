"""What made a value: the visits of the log, their windows and their validation examples."""

import collections
import csv
import io
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import RunLog, Task
from ghostjax.cli import main
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.data.own import OwnTask
from ghostjax.runs.store.run import read_run
from ghostjax.runs.training.trainer import batches
from tests.runs.checks import fails, files
from tests.runs.conftest import BATCH_SIZE, LENGTH
from tests.runs.made_up import write_run

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

HELD_OUT = {"held": "{} of the forum and of the wiki", "other": "{} of quite another kind"}
LONG = "forum:4"  # longer than a window


def shown(path, capsys, *options):
    assert main(["show", str(path), *map(str, options)]) == 0
    return capsys.readouterr()


def test_visits_add_up_to_the_value_and_have_the_windows_that_were_scored(micro_run, capsys):
    before = files(micro_run.path)
    rows = json.loads(shown(micro_run.path, capsys, LONG, "--json").out)
    text = "line 4 of the forum, " * 5
    config, task = read_task(micro_run)
    seen = [batch for batch, _ in zip(batches(config, task), range(config.steps))]
    for name in micro_run.sets:
        own = [row for row in rows if row["set"] == name]
        valued = read_values(micro_run)[name]
        place = list(valued.ids).index(LONG)
        assert len(own) == valued.visits[place] > 0
        assert own[-1]["value"] == pytest.approx(valued.values[place], rel=1e-9)
        for row in own:
            logged = micro_run.scores.slice(row["step"] * BATCH_SIZE + row["row"], 1).to_pylist()[0]
            assert (logged["id"], logged["step"]) == (LONG, row["step"])
            assert (logged[f"score_{name}"], logged["loss"]) == (row["score"], row["loss"])
            assert row["end"] - row["start"] == LENGTH + 1
            assert row["window"] == text[row["start"] : row["end"]]
            k = list(micro_run.sets).index(name)
            inputs = seen[row["step"]].val_rows["inputs"][k].reshape(-1, LENGTH)
            assert len(row["val_examples"]) == len(inputs)
            for window, one in zip(inputs, row["val_examples"]):
                document = HELD_OUT[name].format(one["place"])
                assert one["id"] == f"{name}:{one['place']}"
                assert one["excerpt"] == document[one["start"] :][: LENGTH + 1]
                assert bytes(window.tolist()).rstrip(b"\0").decode() == one["excerpt"][:LENGTH]
    assert files(micro_run.path) == before


def test_csv_table_and_count(micro_run, capsys):
    options = [LONG, "--set", "held"]
    rows = json.loads(shown(micro_run.path, capsys, *options, "--json").out)
    table = list(csv.DictReader(io.StringIO(shown(micro_run.path, capsys, *options, "--csv").out)))
    assert [float(row["score"]) for row in table] == [row["score"] for row in rows]
    assert json.loads(table[0]["val_examples"]) == rows[0]["val_examples"]

    first = json.loads(shown(micro_run.path, capsys, *options, "--json", "--count", 1).out)
    assert len(first) == 1
    assert abs(first[0]["score"]) == max(abs(row["score"]) for row in rows)

    out = shown(micro_run.path, capsys, *options).out
    assert f"{LONG}: validation set held" in out
    assert f"{rows[0]['start']}..{rows[0]['end']}" in out
    assert f"{len(rows)} scored visits, few visits: value {rows[-1]['value']:+.2e}" in out

    held_out = out.split("Held-out examples of these steps: held")[1]
    one = rows[0]["val_examples"][0]
    line = next(line for line in held_out.splitlines() if one["id"] in line)
    steps = [row["step"] for row in rows if one["id"] in [own["id"] for own in row["val_examples"]]]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        *(one["id"], ", ".join(map(str, steps)), one["excerpt"].strip()),
    ]


def test_of_many_held_out_examples_those_of_most_steps_are_printed(micro_run, capsys, monkeypatch):
    monkeypatch.setattr("ghostjax.runs.commands.show.MAX_HELD_OUT", 1)
    options = [LONG, "--set", "held"]
    rows = json.loads(shown(micro_run.path, capsys, *options, "--json").out)
    found = collections.Counter(one["id"] for row in rows for one in row["val_examples"])
    held_out = shown(micro_run.path, capsys, *options).out.split("Held-out examples")[1]
    assert found.most_common(1)[0][0] in held_out
    assert f"and {len(found) - 1} more; --json has all of them" in held_out


def test_arrays_and_tasks_of_ones_own_name_their_held_out_examples(tmp_path, capsys):
    examples = [{"id": f"n{n}", "x": np.float32(n)} for n in range(6)]
    task = Task(
        train=examples[:3],
        val={"named": examples[3:5], "bare": [{"x": np.float32(8)}, {"x": np.float32(9)}]},
        init=lambda seed: {"mean": jnp.zeros(())},
        row_losses=lambda params, batch: (batch["x"] - params["mean"]) ** 2,
        optimizer=optax.sgd(0.1),
    )
    loaded = OwnTask(task)
    assert [one.id for one in loaded.val_examples["named"]] == ["n3", "n4"]
    assert [(one.id, one.excerpt) for one in loaded.val_examples["bare"]] == [
        *(("bare:0", "8"), ("bare:1", "9")),
    ]
    np.savez(tmp_path / "t.npz", x=np.eye(4, 3), y=[0, 1, 0, 1])
    np.savez(tmp_path / "v.npz", x=np.eye(2, 3), y=[0, 1])
    options = ["--train", tmp_path / "t.npz", "--val", f"val={tmp_path / 'v.npz'}"]
    options += ["--model", "micro", "--steps", 2, "--batch-size", 2, "--val-batch-size", 2]
    options += ["--mesh", "data=1"]
    assert main(["train", "--out", *map(str, [tmp_path / "run", *options]), "--quiet"]) == 0
    rows = json.loads(shown(tmp_path / "run", capsys, "t:0", "--json").out)
    found = sorted(rows[0]["val_examples"], key=lambda one: one["place"])
    assert found == [
        {"id": "v:0", "place": 0, "start": 0, "excerpt": "label 0: 1 0 0"},
        {"id": "v:1", "place": 1, "start": 0, "excerpt": "label 1: 0 1 0"},
    ]


def test_without_the_data_there_are_numbers_and_a_line_that_says_why(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    out, err = shown(path, capsys, "wiki:0", "--json")
    assert "No windows and validation examples:" in err
    assert "the data changed since the run began" in " ".join(err.split())
    rows = json.loads(out)
    assert {(row["window"], row["end"], row["val_examples"]) for row in rows} == {(None,) * 3}
    assert np.isfinite([row["score"] for row in rows]).all()
    visits = [visit for visit in read_run(path).scores.to_pylist() if visit["id"] == "wiki:0"] * 2
    assert [row["norm"] for row in rows] == [visit["norm"] for visit in visits]
    assert shown(path, capsys, "wiki:0", "--quiet").err == ""


BAD = {
    "id": (["poem:1"], "no training example 'poem:1' in"),
    "set": (["wiki:0", "--set", "poems"], "no validation set 'poems' in the run"),
    "count": (["wiki:0", "--count", "0"], "--count must be at least 1, got 0"),
    "formats": (["wiki:0", "--csv", "--json"], "--csv and --json exclude each other"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_used(tmp_path, capsys, options, message):
    assert message in fails(["show", write_run(tmp_path / "run"), *options], capsys)


def test_an_example_without_a_visit_has_nothing_to_show(tmp_path, capsys):
    path = write_run(tmp_path / "run", steps=1, finished=False)
    values = read_values(read_run(path))["prose"]
    unvisited = values.ids[~values.visited][0]
    assert f"{unvisited} was not visited so far" in fails(["show", path, unvisited], capsys)


def test_the_log_of_another_loop_has_what_was_logged(tmp_path, capsys):
    with RunLog(tmp_path / "own", ("val",)) as log:
        for step in range(3):
            log.add(step, ["a", "b"], np.float32([1.0, -step]))
    out, err = shown(tmp_path / "own", capsys, "b", "--json")
    assert "is the log of another training loop, which has the data" in " ".join(err.split())
    assert [row["score"] for row in json.loads(out)] == [0, -1, -2]
    assert json.loads(out)[-1]["value"] == -3
    assert "3 scored visits" in shown(tmp_path / "own", capsys, "b").out
    message = fails(["rank", tmp_path / "own", "--by", "loss"], capsys)
    assert "--by loss: the log of" in message
    assert "has no losses of rows" in message
    message = fails(["validate", tmp_path / "own"], capsys)
    assert "is the log of another training loop, which has the data" in message
