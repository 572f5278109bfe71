import logging
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ghostjax
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import checkpoints
from tests.runs.store import killed_checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def small(step):
    return {"a": jnp.full(3, step, jnp.float32)}


def every_kind():
    """A state with all that optimizers, models and values put into one."""
    params = {
        "dense": {"kernel": -jnp.zeros((4, 3), jnp.bfloat16), "bias": jnp.full(3, -0.0)},
        "a/b.c": {"": jnp.arange(3.0)},
        "a": {"b.c": jnp.array([jnp.nan, -jnp.inf])},
    }
    # A NaN with a payload, and the smallest number there is.
    bits = jnp.array([0x7FC00123, 1], jnp.uint32)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(learning_rate=optax.constant_schedule(1e-3)),
    )
    with jax.numpy_dtype_promotion("standard"):
        optimizer = jax.jit(chain.init)(params)
    return {
        "params": params,
        "optimizer": optimizer,
        "values": ghostjax.InRunValues.zeros(5, ("val", "clean")),
        "bits": jax.lax.bitcast_convert_type(bits, jnp.float32),
        "scalar": jnp.int32(-3),
        "flags": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "nothing": ((), None, {}),
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        assert a.committed == b.committed
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = every_kind()
    checkpoints.save(tmp_path, 7, state)
    zeros = jax.tree.map(jnp.zeros_like, state)
    assert_same(checkpoints.restore(tmp_path, 7, zeros), state)


def test_shapes_are_enough_to_restore(tmp_path):
    state = every_kind()
    checkpoints.save(tmp_path, 7, state)
    shapes = jax.tree.map(lambda array: leaf(*array.shape, dtype=array.dtype), state)
    assert_same(checkpoints.restore(tmp_path, 7, shapes), state)


def test_arrays_go_where_those_of_the_run_are(tmp_path):
    mesh = jax.make_mesh((4,), ("d",))
    split, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    state = {"a": jax.device_put(jnp.arange(8.0), split), "b": jnp.arange(4.0)}
    checkpoints.save(tmp_path, 0, state)
    like = {"a": jnp.zeros(8), "b": jax.device_put(jnp.zeros(4), whole)}
    restored = checkpoints.restore(tmp_path, 0, like)
    assert restored["b"].sharding == whole
    assert not restored["a"].committed
    assert_same(checkpoints.restore(tmp_path, 0, state), state)
    np.testing.assert_array_equal(restored["a"], state["a"])


def test_the_newest_two_are_kept(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    for step in (8, 9, 10):
        checkpoints.save(tmp_path, step, small(step))
        assert checkpoints.latest(tmp_path) == step
    assert names(tmp_path / "checkpoints") == ["10", "9"]
    for step in (9, 10):
        assert_same(checkpoints.restore(tmp_path, step, small(0)), small(step))


def test_a_checkpoint_is_read_with_orbax_alone(tmp_path):
    import orbax.checkpoint as ocp

    checkpoints.save(tmp_path, 5, {"params": {"dense": small(1)}})
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        as_numpy = {"['params']['dense']['a']": np.zeros(3, np.float32)}
        found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(as_numpy))
    np.testing.assert_array_equal(found["['params']['dense']['a']"], [1, 1, 1])


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


MISFITS = {
    "lacks": ({"b": leaf(2)}, r"it lacks \['b'\]"),
    "has": ({"a": ...}, r"it has \['a'\], which the run has not"),
    "shape": ({"a": leaf(4)}, r"\['a'\] is float32\[3\], expected float32\[4\]"),
    "rank": ({"a": leaf(1, 3)}, r"\['a'\] is float32\[3\], expected float32\[1, 3\]"),
    "dtype": ({"a": leaf(3, dtype=jnp.bfloat16)}, r"is float32\[3\], expected bfloat16\[3\]"),
    "empty": ({"a": leaf(0)}, r"is float32\[3\], expected float32\[0\]"),
    "several": ({"a": leaf(4), "b": leaf(2)}, r"it lacks \['b'\] \(and 1 more\)"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_of_another_state_is_refused(tmp_path, change, message):
    checkpoints.save(tmp_path, 5, small(1))
    like = {name: leaf for name, leaf in (small(0) | change).items() if leaf is not ...}
    with pytest.raises(UsageError, match=f"checkpoints/5 does not fit this run: .*{message}"):
        checkpoints.restore(tmp_path, 5, like)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"checkpoints/5 is missing"):
        checkpoints.restore(tmp_path, 5, small(0))


def test_a_damaged_file_is_refused(tmp_path, capfd):
    checkpoints.save(tmp_path, 4, small(4))
    checkpoints.save(tmp_path, 5, small(5))
    folder = tmp_path / "checkpoints" / "5"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        for damage in (content[:-2], None):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(UsageError, match=rf"5 is damaged \(.*{path.name}.*\): delete it"):
                checkpoints.restore(tmp_path, 5, small(0))
        path.write_bytes(content)
    assert_same(checkpoints.restore(tmp_path, 5, small(0)), small(5))
    assert capfd.readouterr() == ("", "")

    shutil.rmtree(folder)
    assert checkpoints.latest(tmp_path) == 4
    assert_same(checkpoints.restore(tmp_path, 4, small(0)), small(4))


@pytest.mark.parametrize("value", [np.zeros(3), 1.5, "text"])
def test_only_arrays_are_saved(tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint: \['a'\] must be a jax\.Array, got "):
        checkpoints.save(tmp_path, 5, {"a": value})
    assert names(tmp_path) == []


class Stop(Exception):
    pass


def test_stopped_at_any_renaming_or_removal_it_leaves_whole_checkpoints(tmp_path, monkeypatch):
    for call in range(9):
        out = tmp_path / str(call)
        out.mkdir()
        for step in (1, 2):
            checkpoints.save(out, step, small(step))
        left = [call]

        def stopping(function, left=left):
            def replaced(*args, **options):
                if left[0] == 0:
                    raise Stop
                left[0] -= 1
                return function(*args, **options)

            return replaced

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(shutil, "rmtree", stopping(shutil.rmtree))
            try:
                checkpoints.save(out, 3, small(3))
                stopped = False
            except Stop:
                stopped = True
        newest = checkpoints.latest(out)
        assert newest in (2, 3)
        assert_same(checkpoints.restore(out, newest, small(0)), small(newest))
        checkpoints.save(out, 4, small(4))
        assert len(names(out / "checkpoints")) == 2
        if not stopped:
            break
    assert call >= 3
    assert not stopped


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_whole_checkpoints(tmp_path):
    # JAX warns of every fork.
    command = [sys.executable, "-W", "ignore", "-m", killed_checkpoints.__name__, tmp_path]
    subprocess.run(command, check=True)
    newest = checkpoints.latest(tmp_path)
    assert newest >= killed_checkpoints.KILLS - 1
    killed_checkpoints.check(tmp_path, newest)


@pytest.mark.slow
def test_nothing_is_printed(tmp_path):
    code = f"""
import logging, pathlib
import jax, jax.numpy as jnp
from ghostjax.runs.store import checkpoints
out = pathlib.Path({str(tmp_path)!r})
state = dict(a=jnp.zeros(3))
logging.basicConfig(level=logging.INFO)
for step in range(3):
    checkpoints.save(out, step, state)
checkpoints.restore(out, 2, state)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_logging_is_as_before(tmp_path):
    logger = logging.getLogger("absl")
    before = logger.level
    checkpoints.save(tmp_path, 1, small(1))
    assert logger.level == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Of the same shapes, so that nothing else tells the two apart."""
    mine, other = {"run": "a1", "params": "f0"}, {"run": "b2", "params": "f0"}
    checkpoints.save(tmp_path, 5, small(1), mine)
    assert_same(checkpoints.restore(tmp_path, 5, small(0), mine), small(1))
    with pytest.raises(UsageError, match="5 is of another run: run is a1, expected b2; put back"):
        checkpoints.restore(tmp_path, 5, small(0), other)
    with pytest.raises(UsageError, match="is of another run: params is f0, expected f1"):
        checkpoints.restore(tmp_path, 5, small(0), mine | {"params": "f1"})
    with pytest.raises(UsageError, match="is of another run: params is f0, expected None"):
        checkpoints.restore(tmp_path, 5, small(0))
