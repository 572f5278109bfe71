import errno
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ghostjax
from ghostjax import GradDotProdEngine, RunLog, directions, value_and_dots_fn
from ghostjax.cli import main
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.store import files
from ghostjax.runs.store.run import read_run
from tests.runs import loop_of_ones_own, small_run

ROWS, STEPS, BATCH = 12, 12, 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A log of an optax loop, and the scores by hand: of per-row gradients."""
    x, y = jax.random.normal(jax.random.key(0), (ROWS + 4, 3)), jnp.arange(ROWS + 4) % 2.0
    train, val = (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])
    optimizer = optax.adam(0.01)

    def loss_fn(w, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    @jax.jit
    def step(w, state, ids):
        batch = jax.tree.map(lambda leaf: leaf[ids], train)
        loss, grads, dots = value_and_dots_fn(loss_fn)(w, batch)
        val_grads = jax.grad(loss_fn)(w, val)
        direction = directions.through_optimizer(optimizer, state, w, grads, val_grads)
        rows = jax.vmap(lambda *row: jax.grad(loss_fn)(w, [leaf[None] for leaf in row]))(*batch)
        updates, state = optimizer.update(grads, state, w)
        scores = dots.result(direction).total() / BATCH
        return optax.apply_updates(w, updates), state, loss, scores, rows @ direction / BATCH

    out = tmp_path_factory.mktemp("own") / "run"
    w, by_hand = jnp.zeros(3), np.zeros(ROWS)
    state = optimizer.init(w)
    with RunLog(out, examples={"id": range(ROWS), "domain": ["even", "odd"] * 6}) as log:
        for number in range(STEPS):
            ids = np.arange(number * BATCH, (number + 1) * BATCH) % (ROWS - 1)
            w, state, loss, scores, expected = step(w, state, ids)
            log.add(number, ids, scores, loss=loss)
            np.add.at(by_hand, ids, np.float64(expected))
    return out, by_hand


@pytest.fixture(scope="module", autouse=True)
def plain_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adam
        yield


def test_ranks_are_those_of_the_scores_summed_by_hand(trained, capsys):
    out, by_hand = trained
    assert main(["rank", str(out), "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in ranked[:-1]] == [str(n) for n in np.argsort(-by_hand[:-1])]
    assert (ranked[-1]["id"], ranked[-1]["verdict"]) == ("11", "not visited")
    found = {row["id"]: row["value"] for row in ranked[:-1]}
    expected = [by_hand[int(one)] for one in found]
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-5 * max(map(abs, by_hand)))
    assert {row["verdict"] for row in ranked[:-1]} == {"no error bar"}
    assert {row["domain"] for row in ranked} == {"even", "odd"}


@pytest.mark.parametrize("verb", ["rank", "report", "diff"])
def test_what_is_missing_is_told(trained, verb, capsys):
    out = str(trained[0])
    assert main([verb, out, *([out] if verb == "diff" else [])]) == 0
    text = capsys.readouterr().out
    if verb == "report":
        text = (trained[0] / "report.html").read_text()
        assert "no predicted and actual decreases" in text
    if verb != "diff":
        text = " ".join(text.split())
        assert "Not measured, so the scores are taken on trust: the standard errors" in text
    else:
        assert "11 have no error bar in a run" in text
    assert not re.search(r"\bnan\b", text)


def test_a_run_without_tokens_has_no_heat_map(trained, capsys):
    assert main(["tokens", str(trained[0])]) == 2
    assert "no run on texts" in capsys.readouterr().err


def test_all_that_a_step_can_have(tmp_path, capsys):
    checks = {name: {"a": 1.0, "b": 2.0} for name in ("val_loss", "predicted", "actual")}
    rng, first = np.random.default_rng(0), np.random.default_rng(0).normal(1, 0.1, 2)
    none, own = np.zeros(2), {"b": [-3.0, 2.0], "a": np.ones(2)}
    kinds = {"MLP": {"a": none, "b": [2.0, 0.0]}, "own": own}
    with RunLog(tmp_path / "run", ("a", "b")) as log:
        for step in range(12):
            a = rng.normal(1, 0.1, 2)
            own["a"] = a
            log.add(
                step,
                ["x", "y"],
                {"b": jnp.array([-1.0, 2.0], jnp.bfloat16), "a": a},
                kinds=kinds,
                errors=np.full((2, 2), 0.1),
                losses=[1.0, 3.0],
                norms=jnp.array([0.5, 0.0]),
                starts=[0, 5],
                learning_rate=0.1,
                sizes=[7, 8],
                excerpts=["of  x", "of y"],
                conservation_error=[1e-6, np.nan if step == 3 else 1e-6],
                audit_error=[np.nan, 1e-6],
                correlation=[0.5, np.nan],
                **checks,
            )
        log.add(12, loss=2.5)
    run = read_run(tmp_path / "run")
    assert run.steps["loss"].to_pylist() == [2.0] * 12 + [2.5]
    assert run.scores["norm"].to_pylist() == [0.5, 0.0] * 12
    assert run.kinds.slice(0, 4).to_pylist() == [
        {"step": 0, "kind": "MLP", "set": "a", "score": 0.0},
        {"step": 0, "kind": "MLP", "set": "b", "score": -2.0},
        {"step": 0, "kind": "own", "set": "a", "score": pytest.approx(first.sum(), rel=1e-6)},
        {"step": 0, "kind": "own", "set": "b", "score": 5.0},
    ]
    assert (run.is_finished, run.summary["scored_steps"], run.end) == (True, 12, 13)
    assert run.examples.to_pylist()[0] == {
        **{"id": "x", "domain": "unknown"},
        **{"size": 7, "excerpt": "of x"},
    }
    values = read_values(run)
    assert values["a"].verdicts.tolist() == ["helps", "helps"]
    assert values["b"].verdicts.tolist() == ["hurts", "helps"]
    assert run.summary["fidelity"]["a"]["missing"] == []
    assert any("Broken at step 3, validation set b" in line for line in run.summary["warnings"])
    assert main(["report", str(tmp_path / "run")]) == 0


ADD = {"step": 2, "ids": ["x", "y"], "scores": [1.0, 2.0]}
REFUSED = {
    "shape": ({"scores": [1.0]}, ValueError, r"scores must be \[1, 2\]"),
    "rank": ({"scores": np.ones((3, 2))}, ValueError, r"scores must be \[1, 2\]"),
    "sets": ({"scores": {"other": [1.0, 2.0]}}, ValueError, "expected one per validation set, val"),
    "errors": ({"errors": [[1.0]]}, ValueError, r"errors must be \[1, 2\]"),
    "losses": ({"losses": [1.0]}, ValueError, r"losses must be \[2\]"),
    "norms": ({"norms": [[1.0, 2.0]]}, ValueError, r"norms must be \[2\]"),
    "NaN norm": ({"norms": [1, np.nan]}, ValueError, "step 2: the norm of y is not finite"),
    "below zero": ({"norms": [1.0, -1.0]}, ValueError, "step 2: norms must not be negative"),
    "NaN": ({"scores": [1.0, np.nan]}, ValueError, "step 2: the score of y is not finite"),
    "NaN loss": ({"losses": [np.inf, 1]}, ValueError, "step 2: the loss of x is not finite"),
    "mean loss": ({"loss": np.nan}, ValueError, "step 2: loss is not finite"),
    "val loss": ({"val_loss": np.nan}, ValueError, "step 2: val_loss is not finite"),
    "negative": ({"errors": [1.0, -1.0]}, ValueError, "must not be negative"),
    "texts": ({"scores": ["1", "2"]}, TypeError, "scores must be numbers"),
    "ids": ({"ids": [1.5, 2.5]}, TypeError, "ids must be strings or integers"),
    "ids [B, 1]": ({"ids": [["x"], ["y"]]}, ValueError, r"ids must be \[B\]"),
    "no Unicode": ({"ids": ["x", "\ud800"]}, ValueError, r"id '\\ud800' is no Unicode text, as"),
    "excerpts": (
        *({"excerpts": ["a", "\udcff"]}, ValueError),
        r"id 'y': its excerpt '\\udcff' is no Unicode text, .*errors='backslashreplace'",
    ),
    "padding": ({"ids": [1, -1]}, ValueError, "ids must not be negative: leave out rows"),
    "no ids": ({"ids": None}, ValueError, "step 2: ids are missing"),
    "other ids": ({"ids": [1, 2]}, TypeError, "ids are integers, but those before were strings"),
    "unknown id": ({"ids": ["x", "z"]}, ValueError, "id 'z' is not among the 2 examples"),
    "domain": ({"domains": ["d", "e"]}, ValueError, "id 'y': its domain is 'e', but was 'd'"),
    "domains": ({"domains": ["d"]}, ValueError, "domain: expected one for each of 2 ids"),
    "sizes": ({"sizes": ["1", "2"]}, TypeError, "size: expected int"),
    "starts": ({"starts": [0.5, 1]}, ValueError, r"starts must be integers \[2\]"),
    "reused": ({"step": 1}, ValueError, "step 1 is logged already, the next is 2: to make"),
    "skipped": ({"step": 4}, ValueError, "expected step 2, got 4"),
    "no step": ({"step": 2.0}, TypeError, "step must be an integer, got float"),
    "column": ({"gradient": 1.0}, TypeError, "unknown gradient: a step can have val_loss"),
    "kinds": ({"kinds": [1.0, 2.0]}, TypeError, "kinds must be by the name of a kind of layer"),
    "shape of a kind": ({"kinds": {"MLP": [1.0]}}, ValueError, r"kinds\['MLP'\] must be \[1, 2\]"),
    "a kind is missing": (
        *({"kinds": {"MLP": [1.0, 1.5]}}, ValueError),
        "kinds do not add up to the scores: for y and validation set val to 1.5, its score is 2. G",
    ),
    "kinds at times": (
        {"kinds": {"MLP": [1.0, 2.0]}},
        ValueError,
        "give kinds at all scored steps",
    ),
    "kinds without scores": (
        *({"scores": None, "kinds": {"MLP": [1.0, 2.0]}}, ValueError),
        "a step without scores has no",
    ),
    "unscored": ({"scores": None, "actual": 1.0}, ValueError, "a step without scores has no"),
    "at times": ({"actual": 1.0}, ValueError, "give actual at all scored steps, or at none"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "run"
    with RunLog(out, examples={"id": ["x", "y"], "domain": ["d", "d"]}) as log:
        for step in range(2):
            log.add(step, ADD["ids"], ADD["scores"])
        log.flush()
        yield out, log


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_step_that_cannot_be_logged(begun, change, error, message):
    out, log = begun
    given = ADD | change
    with pytest.raises(error, match=message):
        log.add(given.pop("step"), given.pop("ids"), given.pop("scores"), **given)
    assert log.step == 2
    log.flush()
    assert read_run(out).end == 2


def test_a_traced_step_is_refused(begun):
    with pytest.raises(TypeError, match=r"being traced: call the log outside jax\.jit"):
        jax.jit(lambda scores: begun[1].add(2, ["x", "y"], scores))(jnp.ones(2))


def test_another_process_is_refused(begun):
    with pytest.raises(UsageError, match="another process is writing this run"):
        RunLog(begun[0], resume=True)


OTHERS = {
    "not resumed": ({}, "has a run: give a new directory, or resume=True"),
    "sets": ({"resume": True, "sets": ("b",)}, "has the validation sets val, not b"),
    "options": ({"resume": True, "options": {"seed": 1}}, "its seed is None, not 1"),
    "examples": ({"resume": True, "examples": [1, 3]}, "its examples are not those"),
    "step": ({"resume": True, "step": 4}, "the log has 3 steps, step=4 is not among them"),
    "no resume": ({"step": 4}, "step is where to go on: give resume=True"),
    "no sets": ({"sets": ()}, "sets must be different names"),
    "bad sets": ({"sets": ["a_b"]}, "'a_b' is no name"),
    "flush": ({"flush_every": 0}, "flush_every must be at least 1"),
    "twice": ({"examples": ["a", "a"]}, "id 'a' is there twice"),
    "columns": ({"examples": {"domain": ["a"]}}, "examples: expected id and perhaps domain"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_a_log_that_cannot_be_opened(tmp_path, options, message):
    with RunLog(tmp_path / "run", examples=[1, 2]) as log:
        for step in range(3):
            log.add(step, [1, 2], [1.0, 2.0])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        RunLog(tmp_path / "run", **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_of_something_else(tmp_path):
    small_run.write(tmp_path / "run")
    with pytest.raises(UsageError, match="is a run of ghostjax train"):
        RunLog(tmp_path / "run", small_run.SETS, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="other is not empty"):
        RunLog(tmp_path / "other", resume=True)
    with pytest.raises(UsageError, match="there is no log yet, so none of 3 steps"):
        RunLog(tmp_path / "new", resume=True, step=3)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with RunLog(tmp_path / "run", flush_every=2) as log:
        log.add(0, ["a"], [1.0])
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_file", full)
            with pytest.raises(StoppedError, match=r"No space left.*make room, then call flush"):
                log.add(1, ["b"], [2.0])
        log.add(2, ["a"], [3.0])
    values = read_values(read_run(tmp_path / "run"))["val"]
    assert dict(zip(values.ids, values.values)) == {"a": 4.0, "b": 2.0}


def test_an_exception_keeps_what_came_before(tmp_path):
    def interrupted():
        with RunLog(tmp_path / "run") as log:
            log.add(0, ["a"], [1.0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    run = read_run(tmp_path / "run")
    assert (run.end, run.is_finished) == (1, False)


def test_steps_from_a_checkpoint_on_are_made_again(tmp_path):
    def log(out, first, steps, shift=0.0, **options):
        with RunLog(out, flush_every=4, **options) as log:
            for step in range(first, steps):
                log.add(step, [f"{step + shift}"], [step + shift])

    log(tmp_path / "run", 0, 11)
    log(tmp_path / "run", 6, 9, 0.5, resume=True, step=6, options={"steps": 9})
    run = read_run(tmp_path / "run")
    expected = [*range(6), 6.5, 7.5, 8.5]
    assert run.scores["score_val"].to_pylist() == expected
    assert run.examples["id"].to_pylist() == [f"{n if n > 6 else n + 0.0}" for n in expected]
    assert (run.is_finished, run.metadata["options"]) == (True, {"steps": 9})


@pytest.mark.slow
def test_killed_at_any_time_the_log_is_that_of_one_that_was_not(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", loop_of_ones_own.__name__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] >= 6
    assert counts["calls"] > 40
    whole = read_run(tmp_path / "whole")
    for out in [*(tmp_path / "random").iterdir(), *(tmp_path / "calls").iterdir()]:
        run = read_run(out)
        assert run.is_finished
        for table in ("examples", "scores", "steps"):
            assert getattr(run, table) == getattr(whole, table)
        assert not list(out.rglob("*.partial"))


def row_losses(w, batch):
    return (batch @ w) ** 2


def test_the_engine_adds_up_and_logs(tmp_path):
    engine = GradDotProdEngine(row_losses, val_batch_size=2)
    w, batch = jnp.ones(3), jax.random.normal(jax.random.key(0), (6, 3))
    result = engine(w, batch)
    dots = {"qkv": result.dots, "ln_1": 2 * result.dots}
    with RunLog(tmp_path / "run") as log:
        total = engine.aggregate_and_log(dots, log, step=0, ids=range(4), loss=result.value)
        ghostjax.aggregate_and_log(dots, log, step=1, ids=range(4), scale=0.5)
        for leaf in (jnp.ones(3), jnp.ones((4, 1))):
            with pytest.raises(AssertionError, match=r"\['bad'\]: expected dots \[B_train\]"):
                engine.aggregate_and_log({**dots, "bad": leaf}, log, step=2, ids=range(4))
        with pytest.raises(ValueError, match="dots has no leaves"):
            engine.aggregate_and_log({}, log, step=2, ids=range(4))
        assert log.step == 2
    np.testing.assert_array_equal(total, engine.aggregate(dots))
    np.testing.assert_allclose(total, 3 * result.dots, rtol=1e-6)
    run = read_run(tmp_path / "run")
    np.testing.assert_array_equal(run.numbers("scores", "score_val"), [*total, *(total / 2)])
    sizes = np.abs(total).sum() / 3 * np.array([2, 1, 1, 0.5])
    kinds = run.kinds.to_pylist()
    assert [(row["step"], row["kind"]) for row in kinds] == [
        *((0, "LayerNorm"), (0, "attention"), (1, "LayerNorm"), (1, "attention")),
    ]
    np.testing.assert_allclose([row["score"] for row in kinds], sizes, rtol=1e-6)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "LayerNorm 67%, attention 33%" in page


def test_kinds_are_asked_for_again_after_the_log_is_opened_again(tmp_path):
    with RunLog(tmp_path / "run") as log:
        log.add(0, ["a"], [1.0], kinds=ghostjax.by_kind({"kernel": jnp.ones(1)}))
    with RunLog(tmp_path / "run", resume=True) as log:
        with pytest.raises(ValueError, match="give kinds at all scored steps"):
            log.add(1, ["a"], [1.0])
        log.add(1, ["a"], [1.0], kinds={"other": [1.0]})
    with RunLog(tmp_path / "run", resume=True, step=1) as log:
        log.add(1, ["a"], [-3.0], kinds={"MLP": [1.0], "other": [-4.0]})
    kinds = read_run(tmp_path / "run").kinds.to_pylist()
    assert [tuple(row.values()) for row in kinds] == [
        *((0, "other", "val", 1.0), (1, "MLP", "val", -1.0), (1, "other", "val", 4.0)),
    ]


def test_without_pyarrow_the_engine_works_and_the_log_names_the_extra():
    program = """
import sys
sys.modules["pyarrow"] = None
import ghostjax
assert ghostjax.GradDotProdEngine and "RunLog" in dir(ghostjax)
try:
    ghostjax.RunLog
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == 'ghostjax.RunLog needs pyarrow: pip install "ghostjax[train]"\n', done
