"""A task of one's own: it is scored exactly, goes on, and what is wrong is told beforehand."""

import dataclasses
import json
import shutil
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ghostjax
from ghostjax import Task
from ghostjax.cli import main
from ghostjax.runs import UsageError
from ghostjax.runs.data.batches import VisitOrder
from ghostjax.runs.data.own import OwnTask, find_task
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.run import read_run

pytestmark = pytest.mark.usefixtures("standard_promotion")

RATE, STEPS, BATCH, VAL = 0.05, 3, 4, 4
OPTIONS = {"steps": STEPS, "batch_size": BATCH, "val_batch_size": VAL, "order": 1, "quiet": True}
OPTIONS["mesh"] = "data=1"  # of the tests' eight devices


def examples(count, seed, kind="e"):
    x = np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)
    return [
        {"id": f"{kind}{n}", "domain": f"d{n % 2}", "x": x[n], "y": {"of": np.float32(x[n].sum())}}
        for n in range(count)
    ]


def init(seed):
    kernel = 0.5 * jax.random.normal(jax.random.key(seed), (3, 2))
    return {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(2)}, "scale": jnp.ones(())}


def row_losses(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return (hidden.sum(1) * params["scale"] - batch["y"]["of"]) ** 2


def made(**changes):
    task = Task(
        train=examples(10, 0),
        val={"near": examples(VAL, 1), "far": examples(VAL, 2)},
        init=init,
        row_losses=row_losses,
        optimizer=optax.sgd(RATE),
        unit="squares",
    )
    return dataclasses.replace(task, **changes)


@pytest.mark.slow
def test_scores_are_those_of_autodiff_row_by_row(tmp_path):
    task = made()
    summary = ghostjax.run(task, tmp_path / "run", **OPTIONS)
    run = read_run(tmp_path / "run")
    assert (summary["unit"], run.metadata["kinds"]) == ("squares", ["MLP", "other"])
    assert np.isnan(run.numbers("scores", "learning_rate")).all()
    params, order = init(0), VisitOrder(10, BATCH, 0)
    stacked = [jax.tree.map(lambda *leaves: np.stack(leaves), *map(without, task.train))]
    for source in task.val.values():
        stacked.append(jax.tree.map(lambda *leaves: np.stack(leaves), *map(without, source)))

    @jax.jit
    def step(params, rows, *sets):
        one = jax.grad(
            lambda params, row: row_losses(params, jax.tree.map(lambda a: a[None], row))[0]
        )
        by_row = jax.vmap(one, (None, 0))(params, rows)
        scores = []
        for own in sets:
            val = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one, (None, 0))(params, own))
            parts = jax.tree.map(
                lambda g, v: RATE / BATCH * (g * v[None]).reshape(BATCH, -1).sum(1), by_row, val
            )
            scores.append(sum(jax.tree.leaves(parts)))
        grads = jax.tree.map(lambda leaf: leaf.mean(0), by_row)
        return scores, jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    for number in range(STEPS):
        indices = order(number)
        rows = jax.tree.map(lambda leaf, indices=indices: leaf[indices], stacked[0])
        expected, params = step(params, rows, *stacked[1:])
        ids = run.scores["id"].to_pylist()[number * BATCH : (number + 1) * BATCH]
        assert ids == [f"e{index}" for index in indices]
        for name, own in zip(task.val, expected):
            found = run.numbers("scores", f"score_{name}")[number * BATCH : (number + 1) * BATCH]
            np.testing.assert_allclose(found, own, rtol=0, atol=1e-5 * np.abs(own).max())


def without(example):
    return {name: value for name, value in example.items() if name not in ("id", "domain")}


def test_learning_rates_that_the_optimizer_tells_are_in_the_log(tmp_path):
    optimizer = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.2, 0.0, 4))
    ghostjax.run(made(optimizer=optimizer), tmp_path / "run", **OPTIONS)
    found = read_run(tmp_path / "run").numbers("steps", "learning_rate")
    np.testing.assert_allclose(found, [0.2, 0.15, 0.1], rtol=1e-6)


@pytest.mark.slow
def test_init_is_copied(tmp_path):
    """The run gives up the buffers of its parameters, not those of the user's."""
    kept = init(0)
    ghostjax.run(made(init=lambda seed: kept), tmp_path / "run", **OPTIONS)
    assert np.isfinite(kept["Dense_0"]["kernel"]).all()


def mixing(params, batch):
    losses = row_losses(params, batch)
    return losses - losses.mean()


def mixing_by_data(params, batch):
    order = jnp.argsort(batch["x"][:, 0])
    hidden = batch["x"] @ params["Dense_0"]["kernel"]
    return row_losses(params, batch) + (hidden + hidden[order]).sum(1)


def nan_for(params, batch):
    return row_losses(params, batch) + jnp.where(
        batch["x"][:, 0] > -9, jnp.log(-params["scale"]), 0
    )


def nan_of_val(params, batch):
    far = examples(VAL, 2)[0]["x"][0]
    return row_losses(params, batch) + jnp.where(batch["x"][:, 0] == far, jnp.nan, 0)


TWICE = [*examples(5, 0), examples(5, 0)[2]]
UNEVEN = [*examples(4, 0), {"id": "short", "x": np.zeros(2), "y": {"of": np.float32(0)}}]
LONE = {"train": examples(6, 0)}
WRONG = {
    "no validation set": ({"val": {}}, r"task.val has no validation set: give held-out examples"),
    "val without names": ({"val": examples(4, 1)}, "task.val must be a dictionary of validation"),
    "name of a set": ({"val": {"a_b": examples(4, 1)}}, "letters, digits and hyphens .* 'a_b'"),
    "duplicate ids": ({"train": TWICE}, r"task.train\[2\] and task.train\[5\] .* same id 'e2'"),
    "id": (
        {"train": [*examples(4, 0), {**examples(1, 0)[0], "id": "\ud800"}]},
        r"task.train\[4\]: its id '\\ud800' is no Unicode text, .*errors='backslashreplace'",
    ),
    "shapes": (
        {"train": UNEVEN},
        r"task.train\[4\] has x float64\[2\], but task.train\[0\]: float3",
    ),
    "no examples": ({"train": []}, "task.train has no examples"),
    "no source": ({"train": iter(())}, r"task.train must have len\(\) and take numbers in \[\]"),
    "no mapping": ({"train": [np.ones(3)] * 4}, r"task.train\[0\] must be a dictionary of arrays"),
    "nothing": ({"train": [None] * 4}, r"task.train\[0\] must be a dictionary .* got None"),
    "only ids": ({"train": [{"id": "a"}]}, "has no arrays beside id, domain, excerpt"),
    "text": (
        {"train": [{"id": "a", "text": "b"}]},
        r"task.train\[0\]: text is no array of numbers",
    ),
    "init": ({"init": None}, "task.init must be a function, got None"),
    "optimizer": ({"optimizer": 0.1}, "task.optimizer must be an optax Grad.* got a float"),
    "integers": (
        {"init": lambda seed: {"n": jnp.zeros(2, int)}},
        "task.init: parameters must be re",
    ),
    "no parameters": ({"init": lambda seed: {}}, "task.init gave no parameters"),
    "scalar loss": (
        {"row_losses": lambda params, batch: row_losses(params, batch).mean()},
        r"row_losses gave float32\[\] for 4 training rows: expected one loss per row, float32\[4\]",
    ),
    "several outputs": (
        {"row_losses": lambda params, batch: (row_losses(params, batch), 0)},
        "row_losses gave a tree for 4 training rows",
    ),
    "mixed rows": (
        {"row_losses": mixing},
        "row_losses mixes rows, so that no example .* In a task, take jax.vmap of",
    ),
    "mixed by data": ({"row_losses": mixing_by_data}, "row_losses mixes rows.* the data decide of"),
    "nan": (
        {"row_losses": nan_for},
        r"at the initial parameters, the loss of e\d+, .* is nan: look",
    ),
    "nan of a set": (
        {"row_losses": nan_of_val},
        "a loss of validation set far is nan: look at ini",
    ),
    "lion": ({"optimizer": optax.lion(0.1)}, "task.optimizer: .*derivative"),
    "micro-steps": (
        {"optimizer": optax.MultiSteps(optax.sgd(0.1), 2)},
        "MultiSteps only gathers the gradient of step 0, so that its rows would score zero",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as raised:
        ghostjax.run(made(**changes), tmp_path / "run", **OPTIONS)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.1}, "--learning-rate: the task has an optimizer of its own"),
        ({"clip": 1.0}, "--clip: the task has an optimizer of its own"),
        ({"model": "micro"}, "--model and --task exclude each other"),
        ({"batch_size": 11}, "--batch-size 11 is more than the 10 training examples"),
        (
            {"val_batch_size": 6},
            "--val-batch-size 6 is more than the 4 examples of validation set n",
        ),
    ],
)
def test_options_that_do_not_go_with_a_task(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        ghostjax.run(made(), tmp_path / "run", **{**OPTIONS, **options})


MODULE = """
    import tests.runs.data.test_own as own
    RATE = 0.05
    def make():
        import optax
        return own.made(optimizer=optax.sgd(RATE))
    def number():
        return 3
    three = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, under a name of its own."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make", "--task make: expected module:function, such as my_package.my_module:make_task"),
        ("no_such_module_here:make", "there is no module no_such_module_here in "),
        ("{}:nothing", "has no nothing"),
        ("{}:number", "returned a int, expected a ghostjax.Task"),
        ("{}:three", "is a int, expected a function that returns a Task"),
    ],
)
def test_names_that_lead_to_no_task(module, tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        find_task(name.format(module), [tmp_path])


def test_the_command_line_resumes_and_refuses_a_task_that_changed(
    module, tmp_path, monkeypatch, capsys
):
    command = ["train", "--out", str(tmp_path / "run"), "--quiet"]
    begin = ["--task", f"{module}:make", "--batch-size", "4", "--val-batch-size", "4"]
    begin += ["--mesh", "data=1"]
    assert main([*command, *begin, "--steps", "2", "--order", "1"]) == 0
    assert main([*command, "--resume", "--steps", "3"]) == 0
    ghostjax.run(made(), tmp_path / "python", **OPTIONS)
    whole, parts = read_run(tmp_path / "python").scores, read_run(tmp_path / "run").scores
    without_rates = [table.drop_columns("learning_rate") for table in (parts, whole)]
    assert without_rates[0].equals(without_rates[1])  # the rates are NaN, unequal to themselves

    # From another directory the module is found where it was.
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main([*command, "--resume", "--steps", "4"]) == 0
    capsys.readouterr()
    changed = {
        "optimizer": (made(optimizer=optax.sgd(0.06)), "the task's optimizer changed since"),
        "losses": (made(row_losses=mixing), "the task's row_losses changed since the run began"),
        "data": (
            made(val={**made().val, "far": examples(VAL, 3)}),
            "the data changed since the run began: validation set far",
        ),
        "shapes": (
            made(init=lambda seed: {**init(seed), "scale": jnp.ones(1)}, row_losses=row_losses),
            "the task's row_losses and optimizer changed since",
        ),
    }
    for task, message in changed.values():
        monkeypatch.setattr(f"{module}.make", lambda task=task: task)
        assert main([*command, "--resume", "--steps", "5"]) == 2
        assert message in capsys.readouterr().err
    assert read_run(tmp_path / "run").end == 4
    assert main([*command, "--resume", "--steps", "5", "--task", "a:b"]) == 2
    assert f"it has --task {module}:make, not a:b" in capsys.readouterr().err


def test_a_run_that_was_started_with_a_task_is_resumed_with_it(tmp_path, capsys):
    out = tmp_path / "run"
    ghostjax.run(made(), out, **OPTIONS)
    assert main(["train", "--out", str(out), "--resume", "--steps", "4"]) == 2
    assert "was started in Python, with a task that has no name" in capsys.readouterr().err
    summary = ghostjax.run(made(), out, resume=True, steps=4, quiet=True)
    assert (summary["steps"], checkpoints.latest(out)) == (4, 4)
    metadata = json.loads((out / "run.json").read_text())
    assert set(metadata["data"]) == {
        "training examples",
        *(f"validation set {n}" for n in made().val),
    }


def test_initial_parameters_count_where_they_are_used(tmp_path):
    out = tmp_path / "run"
    ghostjax.run(made(), out, **{**OPTIONS, "steps": 2})
    other = made(init=lambda seed: jax.tree.map(lambda leaf: 2 * leaf, init(seed)))
    ghostjax.run(other, out, resume=True, steps=3, quiet=True)  # its checkpoint has them
    for path in ("summary.json", "values.parquet"):
        (out / path).unlink()
    for folder in ("checkpoints", "log"):
        for path in sorted((out / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match="what the task's init gives changed since the run began"):
        ghostjax.run(other, out, resume=True, quiet=True)


def test_examples_without_ids_are_numbered():
    source = [{"x": np.float32(n), "excerpt": f"number {n}"} for n in range(2)]
    own = OwnTask(made(train=source, val={"val": source}))
    assert [tuple(example) for example in own.examples] == [
        ("train:0", "train", 1, "number 0"),
        ("train:1", "train", 1, "number 1"),
    ]


def test_examples_that_change_while_training_are_told(tmp_path):
    class Unsteady(list):
        def __getitem__(self, index):
            self.read = getattr(self, "read", 0) + 1
            found = super().__getitem__(index)
            return found if self.read <= 12 else {**found, "x": np.zeros(self.read, np.float32)}

    with pytest.raises(UsageError, match=r"task\.train: its examples changed since the run began"):
        ghostjax.run(made(train=Unsteady(examples(10, 0))), tmp_path / "run", **OPTIONS)


def test_a_run_starts_from_given_weights_and_goes_on_with_no_others(tmp_path):
    first, out = tmp_path / "first", tmp_path / "run"
    ghostjax.run(made(), first, **OPTIONS)
    weights = first / "checkpoints" / str(STEPS)
    ghostjax.run(made(), out, init_from=weights, **OPTIONS)
    begun = read_run(out).metadata
    assert begun["options"]["init_from"] == str(weights)
    assert begun["fingerprints"]["params"] != read_run(first).metadata["fingerprints"]["params"]
    loss = read_run(out).numbers("steps", "loss")[0]
    assert loss != read_run(first).numbers("steps", "loss")[0]
    ghostjax.run(made(), out, resume=True, steps=4, quiet=True)
    ghostjax.run(made(), first, resume=True, steps=6, quiet=True)
    shutil.rmtree(weights)
    (first / "checkpoints" / "6").rename(weights)
    with pytest.raises(UsageError, match=r"the weights in .* changed since the run began"):
        ghostjax.run(made(), out, resume=True, steps=5, quiet=True)
