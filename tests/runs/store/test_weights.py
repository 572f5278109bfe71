"""Weights that a run starts from: whoever wrote them, and what is told where they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.weights import read_weights
from ghostjax.runs.training.step import TrainState

LIKE = {"a": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "layers": [jnp.zeros(2)]}
GIVEN = jax.tree.map(lambda leaf: jnp.arange(1.0, 1 + leaf.size).reshape(leaf.shape) / 7, LIKE)
NAMES = {
    "a.kernel": np.asarray(GIVEN["a"]["kernel"]),
    "a.bias": np.asarray(GIVEN["a"]["bias"]),
    "layers.0": np.asarray(GIVEN["layers"][0]),
}


def of_orbax(folder, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def of_a_run(folder, params):
    checkpoints.save(folder, 3, TrainState(params, {"count": jnp.zeros(())}))
    return folder / "checkpoints" / "3"


def of_a_manager(folder, params):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(5, args=ocp.args.StandardSave(params))
    return folder / "5"


def of_safetensors(path, arrays):
    pytest.importorskip("safetensors", reason="it is in the extra test")
    from safetensors.numpy import save_file

    save_file(arrays, path)
    return path


WRITERS = {
    "orbax": lambda path: of_orbax(path / "w", GIVEN),
    "orbax, a train state": lambda path: of_orbax(
        path / "w", {"params": GIVEN, "step": jnp.zeros(())}
    ),
    "orbax, a manager": lambda path: of_a_manager(path / "w", GIVEN),
    "a run": lambda path: of_a_run(path, GIVEN),
    "safetensors": lambda path: of_safetensors(path / "w.safetensors", NAMES),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_weights_are_read_whoever_wrote_them(tmp_path, write):
    found = read_weights(write(tmp_path), LIKE)
    assert jax.tree.structure(found) == jax.tree.structure(LIKE)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(GIVEN)):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, two)


def test_nnx_states_and_other_dtypes(tmp_path):
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    halves = {
        name: np.ones(shape, jnp.bfloat16) for name, shape in (("kernel", (2, 3)), ("bias", 3))
    }
    found = read_weights(of_safetensors(tmp_path / "w.safetensors", halves), state)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [jnp.float32, jnp.float32]
    assert jax.tree.structure(found) == jax.tree.structure(state)


WRONG = {
    "no such path": (lambda path: path / "none", "--init-from .*none does not exist"),
    "another folder": (lambda path: path, "no orbax checkpoint .*take RUN/checkpoints/STEP"),
    "no safetensors": (
        lambda path: (path / "x.safetensors").write_bytes(b"junk") and path / "x.safetensors",
        "no safetensors file",
    ),
    "names and shapes": (
        lambda path: of_safetensors(
            path / "w.safetensors",
            {"a.kernel": NAMES["a.kernel"].T.copy(), "a.offset": np.ones(3, np.float32)},
        ),
        r"does not fit the model: it lacks a.bias \[3\]; it lacks layers.0 \[2\]; it has a.offset "
        r"\[3\]; a.kernel is \[3, 2\], expected \[2, 3\]",
    ),
    "integers": (
        lambda path: of_safetensors(
            path / "w.safetensors", {**NAMES, "layers.0": np.arange(2, dtype=np.int32)}
        ),
        "layers.0 is int32, not of floats",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_weights_that_cannot_be_used(tmp_path, make, message):
    path = make(tmp_path)
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="it is in the extra test")
    with pytest.raises(UsageError, match=message) as raised:
        read_weights(path, LIKE)
    assert "\n" not in str(raised.value)


def test_without_safetensors_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    path = tmp_path / "w.safetensors"
    path.touch()
    with pytest.raises(UsageError, match=r'pip install "ghostjax\[safetensors\]"'):
        read_weights(path, LIKE)
