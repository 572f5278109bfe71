"""Clipped gradients and norms on meshes whose axes are explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import squared_norms, testing, value_and_clipped_grad
from tests.dots import test_explicit as blocks
from tests.norms.checks import Rows

WEIGHTS = jnp.array([1, 0, 2, 1, 0.5, 1, 1, 3], jnp.float32)
USERS = jnp.array([0, 1, 0, 2, 2, 1, 0, -1])
MAX_NORM = 0.5


@pytest.fixture(scope="module")
def rows():
    return Rows.of(blocks.rows_of, blocks.PARAMS, blocks.BATCH)


def on_rows(array):
    return jax.device_put(array, NamedSharding(blocks.MESH, blocks.ROWS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "loop"),
    [("data", "layers"), ("tensor", "scan"), ("fsdp", "remat"), ("fsdp_tensor", "layers")],
)
def test_clipped(case, loop, rows):
    assert set(blocks.MESH.axis_types) == {AxisType.Explicit}
    specs, mesh = blocks.CASES[case]

    def losses(params, batch):
        return blocks.rows_of(params, batch, mesh, **blocks.LOOPS[loop])

    def run(params, batch, weights):
        clipped = value_and_clipped_grad(losses, MAX_NORM, weights=weights)
        return squared_norms(losses)(params, batch), clipped(params, batch)

    with jax.set_mesh(blocks.MESH):
        params, batch = blocks.placed(blocks.PARAMS, specs), jax.tree.map(on_rows, blocks.BATCH)
        compiled = jax.jit(run).lower(params, batch, on_rows(WEIGHTS)).compile()
        norms, (value, grads) = compiled(params, batch, on_rows(WEIGHTS))
    testing.assert_dots_close(norms, rows.squares())
    testing.assert_dots_close(grads, rows.clipped_sum(MAX_NORM, WEIGHTS))
    np.testing.assert_allclose(value, jnp.sum(blocks.rows_of(blocks.PARAMS, blocks.BATCH)), 1e-6)
    for name, leaf in grads.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), name
    shapes = [shape for found in testing.collectives(compiled) for shape in found.shapes]
    with_all_rows = {shape for shape in shapes if shape[:1] == (blocks.B,) and len(shape) > 1}
    # What is looked up with out_sharding, which JAX does where axes are automatic, and its places.
    assert with_all_rows <= {(blocks.B, blocks.T, blocks.D), (blocks.B, blocks.T, 1)}


def test_users(rows):
    specs, mesh = blocks.CASES["fsdp_tensor"]

    def losses(params, batch):
        return blocks.rows_of(params, batch, mesh)

    with jax.set_mesh(blocks.MESH):
        params, batch = blocks.placed(blocks.PARAMS, specs), jax.tree.map(on_rows, blocks.BATCH)
        clipped = jax.jit(value_and_clipped_grad(losses, MAX_NORM), static_argnames="num_labels")
        _, grads = clipped(params, batch, labels=on_rows(USERS), num_labels=3)
    testing.assert_dots_close(grads, rows.added_up(USERS, 3).clipped_sum(MAX_NORM))


def test_whole_rows_on_an_explicit_mesh(rows):
    """Parameters and rows that no axis splits."""
    with jax.set_mesh(blocks.MESH):
        whole = NamedSharding(blocks.MESH, PartitionSpec())
        params, batch = jax.device_put((blocks.PARAMS, blocks.BATCH), whole)
        _, grads = jax.jit(value_and_clipped_grad(blocks.rows_of, MAX_NORM))(params, batch)
    testing.assert_dots_close(grads, rows.clipped_sum(MAX_NORM))
