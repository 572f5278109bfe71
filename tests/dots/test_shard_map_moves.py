"""Rows that move on a device, and positions, inside of ``jax.shard_map``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import direction_like, draw
from tests.dots.checks import expected_dots


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sorted", "row_by_row", "recurrent"])
def test_rows_that_move_on_a_device(order):
    """Tokens sorted by expert on every device, and a loop over a device's rows."""
    params = {"w": draw(2, 5, 4), "v": draw(4, 5, seed=2)}
    x = draw(8, 4, 5, seed=1)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)

    def kinds_of(x):
        return (x[..., 0] > 0).astype(jnp.int32)

    def row_losses(params, x):
        h = jnp.einsum("btf,btfo->bto", x, params["w"][kinds_of(x)])
        return jnp.mean(jnp.square(jnp.tanh(h) @ params["v"] + x), axis=(1, 2))

    def local(params, x):
        if order == "recurrent":
            xs = x[jnp.argsort(x[:, 0, 0])].swapaxes(0, 1)
            h = jax.lax.scan(
                lambda h, x: (
                    jnp.tanh(h @ params["v"] @ params["w"][0] + x @ params["w"][1]),
                    None,
                ),
                jnp.zeros((len(x), 4)),
                xs,
            )[0]
            return jax.lax.pmean(jnp.mean(jnp.square(h)), "data")
        if order == "row_by_row":
            loss = jnp.mean(jax.lax.map(lambda row: row_losses(params, row[None])[0], x))
            return jax.lax.pmean(loss, "data")
        tokens = x.reshape(-1, 5)
        order_ = jnp.argsort(kinds_of(tokens))
        sizes = jnp.bincount(kinds_of(tokens), length=2)
        h = jax.lax.ragged_dot(tokens[order_], params["w"], sizes)
        h = jnp.zeros((len(tokens), 4)).at[order_].set(h).reshape(*x.shape[:2], 4)
        loss = jnp.mean(jnp.square(jnp.tanh(h) @ params["v"] + x))
        return jax.lax.pmean(loss, "data")

    def loss_fn(params, x):
        return jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
        )(params, x)

    def recurrent(params, x):
        h = jnp.zeros((len(x), 4))
        for k in range(4):
            h = jnp.tanh(h @ params["v"] @ params["w"][0] + x[:, k] @ params["w"][1])
        return jnp.mean(jnp.square(h), axis=1)

    direction = direction_like(params)
    fn = value_grad_and_dots(loss_fn)
    result = jax.jit(lambda p, x, v: fn(p, x, direction=v))(params, x, direction)
    of_rows = recurrent if order == "recurrent" else row_losses
    testing.assert_dots_close(result.dots, expected_dots(of_rows, params, x, direction))
    assert int(result.conflicts) == 0
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5
    with pytest.raises(
        NotImplementedError, match=r"rows are moved inside of shard_map at(.|\n)*remat"
    ):
        value_and_dots_fn(loss_fn)(params, x)


def test_positions_on_a_device():
    """Labels [B, T] go in with the rows."""
    params = {"w": draw(5, 4), "v": draw(4, 5, seed=2)}
    x, labels = draw(8, 4, 5, seed=1), jnp.arange(32).reshape(8, 4) % 7 - 1
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)

    def outputs(params, x):
        h = jnp.tanh(x.reshape(-1, 5) @ params["w"])[::-1].reshape(*x.shape[:2], 4)
        return (h[::-1, ::-1] @ params["v"]) + x

    def loss_fn(params, x):
        run = jax.shard_map(
            outputs, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
        )
        return jnp.sum(jnp.square(run(params, x) @ params["w"]))

    def places(params, x):
        return jnp.sum(jnp.square(outputs(params, x[:, None]) @ params["w"]), axis=(1, 2))

    direction = direction_like(params)
    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")
    given = {"labels": labels, "num_labels": 6}
    result = jax.jit(lambda p, x, v: fn(p, x, direction=v, **given))(params, x, direction)
    single = expected_dots(places, params, x.reshape(32, 5), direction)
    expected = jax.tree.map(
        lambda leaf: np.stack([leaf[labels.ravel() == s].sum() for s in range(6)]), single
    )
    testing.assert_dots_close(result.dots, expected)


@pytest.mark.slow
def test_rows_that_move_on_a_device_and_cross_to_others():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))

    def local(params, x):
        h = jnp.tanh(x @ params["w"])[::-1]
        return jax.lax.pmean(jnp.mean(jnp.square(jax.lax.psum(h, "data") @ params["v"])), "data")

    params = {"w": draw(5, 4), "v": draw(4, 5, seed=2)}
    loss_fn = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=r"\['v'\] meets data .*psum.*goes over the devices"):
        value_grad_and_dots(loss_fn)(params, draw(8, 5, seed=1), direction=params)
