"""Norms, pairs and clipped gradients of rows on several devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import pairwise_dots, squared_norms, testing, value_and_clipped_grad
from tests.dots.checks import draw, mean_squares
from tests.dots.test_sharded import mesh_of

PARAMS = {"w": draw(8, 8) / 3, "v": draw(8, 3), "b": draw(1, 1, 3)}
X = draw(16, 4, 8, seed=1)
ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


def losses(params, x):
    h = jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"])
    return mean_squares(h @ params["v"] + params["b"])


FUNCTIONS = {
    "norms": squared_norms,
    "pairs": pairwise_dots,
    "clipped": lambda loss_fn: value_and_clipped_grad(loss_fn, 0.1),
}


@pytest.fixture(scope="module")
def expected():
    return {name: jax.jit(fn(losses))(PARAMS, X) for name, fn in FUNCTIONS.items()}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_on_several_devices(name, axis_type, expected):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, ROWS))
        params = jax.device_put(PARAMS, NamedSharding(mesh, WHOLE))
        if name == "clipped" and axis_type == AxisType.Explicit:
            with pytest.raises(NotImplementedError, match=r"explicit axis .* AxisType.Auto"):
                jax.jit(FUNCTIONS[name](losses))(params, x)
            return
        found = jax.jit(FUNCTIONS[name](losses))(params, x)
    testing.assert_dots_close(jax.device_get(found), jax.device_get(expected[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_of_shard_map_is_refused(name):
    options = {"mesh": mesh_of(AxisType.Auto), "in_specs": (WHOLE, ROWS), "out_specs": ROWS}
    loss_fn = jax.shard_map(losses, **options)
    with pytest.raises(NotImplementedError, match=r"meet inside of shard_map, .* Use jax.jit with"):
        jax.jit(FUNCTIONS[name](loss_fn))(PARAMS, X)


def inside(function, out_specs, check_vma):
    options = {"mesh": mesh_of(AxisType.Auto), "in_specs": (WHOLE, ROWS), "out_specs": out_specs}
    return jax.jit(jax.shard_map(function, check_vma=check_vma, **options))(PARAMS, X)


def added_up(params, x):
    return jax.lax.psum(value_and_clipped_grad(losses, 0.1)(params, x), "data")


def test_inside_of_shard_map(expected):
    """What the error says."""
    found = inside(squared_norms(losses), ROWS, False)
    testing.assert_dots_close(found, expected["norms"])
    testing.assert_dots_close(inside(added_up, WHOLE, False), expected["clipped"])


@pytest.mark.parametrize("function", [squared_norms(losses), pairwise_dots(losses), added_up])
def test_inside_of_a_shard_map_that_checks(function):
    with pytest.raises(NotImplementedError, match=r"Pass check_vma=False"):
        inside(function, ROWS, True)
