"""Losses that contain ``jax.shard_map``, with parameters inside and without."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import directions_like, draw
from tests.dots.checks import expected_stacked
from tests.variants import some_quick

B, T, D, F = 8, 4, 4, 6
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
PARAMS = {"w": draw(D, F) / 2, "b": draw(F) / 3, "v": draw(F, D) / 2, "emb": draw(6, D)}
BATCH = {"x": draw(B, T, D, seed=1), "ids": np.arange(B * T).reshape(B, T) * 5 % 6}
WHOLE = {name: P() for name in PARAMS}
TENSOR = {"w": P(None, "model"), "b": P("model"), "v": P("model"), "emb": P("model")}
FSDP = {"w": P("data"), "b": P(), "v": P(None, "data"), "emb": P(None, "data")}
ROWS, EIGHT = P("data"), P(("data", "model"))


def mean_of_rows(y):
    return jnp.mean(jnp.square(y).reshape(y.shape[0], -1), axis=1)


def hidden(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None, None])


def block(p, x):
    return hidden(p, x) @ p["v"] + x


def embedded(p, batch):
    return batch["x"] + p["emb"][batch["ids"]]


def rows_of(p, batch):
    """The losses of rows, without a mesh: what every case below computes in its way."""
    return mean_of_rows(block(p, embedded(p, batch)))


def mapped(function, params=WHOLE, rows=ROWS, out=None, **options):
    out = P() if out is None else out
    return jax.shard_map(function, mesh=MESH, in_specs=(params, rows), out_specs=out, **options)


def mean(x, axes="data"):
    return jax.lax.pmean(jnp.mean(x), axes)


def looked_up(p, batch):
    """A table whose first axis is split over "model"."""
    start = jax.lax.axis_index("model") * 3
    own = batch["ids"] - start
    found = jnp.where(((own >= 0) & (own < 3))[..., None], p["emb"][jnp.clip(own, 0, 2)], 0)
    return batch["x"] + jax.lax.psum(found, "model")


def tensor_block(p, x):
    return jax.lax.psum(hidden(p, x) @ p["v"], "model") + x


def gathered(p):
    def whole(name, axis):
        return jax.lax.all_gather(p[name], "data", axis=axis, tiled=True)

    return {"b": p["b"], "w": whole("w", 0), "v": whole("v", 1), "emb": whole("emb", 1)}


def data(check_vma):
    return mapped(lambda p, batch: mean(rows_of(p, batch)), check_vma=check_vma)


def losses_leave(check_vma):
    run = mapped(rows_of, out=ROWS, check_vma=check_vma)
    return lambda p, batch: jnp.mean(run(p, batch))


def means_leave(check_vma):
    run = mapped(lambda p, batch: jnp.mean(rows_of(p, batch))[None], out=ROWS, check_vma=check_vma)
    return lambda p, batch: jnp.mean(run(p, batch))


def one_row_each(check_vma):
    run = mapped(rows_of, rows=EIGHT, out=EIGHT, check_vma=check_vma)
    return lambda p, batch: jnp.mean(run(p, batch))


def one_row_each_with_more_uses(check_vma):
    """The axis of the row leaves and comes back on one device, and outside."""

    def inside(p, batch):
        return block(p, embedded(p, batch).reshape(T, D)[None]).reshape(T, D)

    run = mapped(inside, rows=EIGHT, out=EIGHT, check_vma=check_vma)
    return lambda p, batch: jnp.mean(mean_of_rows(run(p, batch).reshape(B, T, D)))


def copies(check_vma):
    """Every device computes everything."""
    run = mapped(rows_of, rows=P(), out=P(), check_vma=check_vma)
    return lambda p, batch: jnp.mean(run(p, batch))


def tensor(check_vma):
    def inside(p, batch):
        return mean(mean_of_rows(tensor_block(p, looked_up(p, batch))))

    return mapped(inside, TENSOR, check_vma=check_vma)


def tensor_alone(check_vma):
    def inside(p, batch):
        return jnp.mean(mean_of_rows(tensor_block(p, looked_up(p, batch))))

    return mapped(inside, TENSOR, P(), check_vma=check_vma, axis_names={"model"})


def scattered(check_vma):
    """Features scattered among devices and gathered again, as sequence parallelism has it."""

    def inside(p, batch):
        x = looked_up(p, batch)
        y = jax.lax.psum_scatter(hidden(p, x) @ p["v"], "model", scatter_dimension=1, tiled=True)
        own = jax.lax.all_gather(y, "model", axis=1, tiled=True) + x
        return mean(mean_of_rows(own), ("data", "model"))

    return mapped(inside, TENSOR, check_vma=check_vma)


def positions(check_vma):
    """Positions of a row on two devices; every device has both of them at the block's turn."""

    def inside(p, batch):
        x = embedded(p, batch)
        h = jax.lax.all_to_all(hidden(p, x), "model", 2, 1, tiled=True)
        h = jax.lax.all_to_all(h, "model", 1, 2, tiled=True)
        y = jax.lax.ppermute(h @ p["v"] + x, "model", [(0, 1), (1, 0)])
        return mean(mean_of_rows(y), ("data", "model"))

    return mapped(inside, rows=P("data", "model"), check_vma=check_vma)


def fsdp(check_vma):
    def inside(p, batch):
        return mean(rows_of(gathered(p), batch))

    return mapped(inside, FSDP, check_vma=check_vma)


def fsdp_rematerialized(check_vma):
    def inside(p, batch):
        return mean(jax.checkpoint(lambda p, batch: rows_of(gathered(p), batch))(p, batch))

    return mapped(inside, FSDP, check_vma=check_vma)


def part_of_the_loss(check_vma):
    run = mapped(lambda p, batch: hidden(p, embedded(p, batch)), out=ROWS, check_vma=check_vma)

    def loss_fn(p, batch):
        return jnp.mean(mean_of_rows(run(p, batch) @ p["v"] + embedded(p, batch)))

    return loss_fn


def rows_on_the_second_axis(check_vma):
    def inside(p, x):
        return jnp.swapaxes(block(p, jnp.swapaxes(x, 0, 1)), 0, 1)

    run = mapped(inside, rows=P(None, "data"), out=P(None, "data"), check_vma=check_vma)

    def loss_fn(p, batch):
        y = run(p, jnp.swapaxes(embedded(p, batch), 0, 1))
        return jnp.mean(mean_of_rows(jnp.swapaxes(y, 0, 1)))

    return loss_fn


def flattened(check_vma):
    """Devices have [B/4 * T, F]."""

    def inside(p, x):
        return (hidden(p, x[None]) @ p["v"])[0] + x

    run = mapped(inside, rows=ROWS, out=ROWS, check_vma=check_vma)

    def loss_fn(p, batch):
        y = run(p, embedded(p, batch).reshape(B * T, D))
        return jnp.mean(mean_of_rows(y.reshape(B, T, D)))

    return loss_fn


def every_device_has_a_position(check_vma):
    """[T * B, F], of which a device has a block of all rows."""

    def inside(p, x):
        return (hidden(p, x[None]) @ p["v"])[0] + x

    run = mapped(inside, rows=ROWS, out=ROWS, check_vma=check_vma)

    def loss_fn(p, batch):
        y = run(p, jnp.swapaxes(embedded(p, batch), 0, 1).reshape(T * B, D))
        return jnp.mean(mean_of_rows(jnp.swapaxes(y.reshape(T, B, D), 0, 1)))

    return loss_fn


def without_parameters(check_vma):
    """The middle of the block, on devices with parts of a row's features."""

    def inside(h):
        h = jax.lax.all_to_all(jnp.tanh(h), "model", 1, 2, tiled=True)
        return jax.lax.all_to_all(h, "model", 2, 1, tiled=True)

    run = jax.shard_map(
        inside,
        mesh=MESH,
        in_specs=P("data", None, "model"),
        out_specs=P("data", None, "model"),
        check_vma=check_vma,
    )

    def loss_fn(p, batch):
        x = embedded(p, batch)
        h = run(x @ p["w"] + p["b"][None, None])
        return jnp.mean(mean_of_rows(h @ p["v"] + x))

    return loss_fn


def nested(check_vma):
    def inside(p, batch):
        inner = jax.shard_map(
            lambda p, x: tensor_block(p, x),
            in_specs=(TENSOR, P()),
            out_specs=P(),
            axis_names={"model"},
            check_vma=check_vma,
        )
        return mean(mean_of_rows(inner(p, embedded(p, batch))))

    return mapped(inside, check_vma=check_vma, axis_names={"data"})


def in_a_loop(check_vma):
    """One layer after the other, each in a ``shard_map``, positions of one row one by one."""
    run = mapped(
        lambda p, x: tensor_block(p, x[:, None])[:, 0], TENSOR, out=ROWS, check_vma=check_vma
    )

    def loss_fn(p, batch):
        x = jnp.swapaxes(embedded(p, batch), 0, 1)
        _, y = jax.lax.scan(lambda _, x: (None, run(p, x)), None, x)
        return jnp.mean(mean_of_rows(jnp.swapaxes(y, 0, 1)))

    return loss_fn


def with_a_loop(check_vma):
    def inside(p, batch):
        x = jnp.swapaxes(looked_up(p, batch), 0, 1)
        _, y = jax.lax.scan(
            jax.checkpoint(lambda _, x: (None, tensor_block(p, x[:, None])[:, 0])), None, x
        )
        return mean(mean_of_rows(jnp.swapaxes(y, 0, 1)))

    return mapped(inside, TENSOR, check_vma=check_vma)


CASES = [
    data,
    losses_leave,
    means_leave,
    one_row_each,
    one_row_each_with_more_uses,
    copies,
    tensor,
    tensor_alone,
    scattered,
    positions,
    fsdp,
    fsdp_rematerialized,
    part_of_the_loss,
    rows_on_the_second_axis,
    flattened,
    every_device_has_a_position,
    without_parameters,
    nested,
    in_a_loop,
    with_a_loop,
]


# Where time matters, every case with a check or without, but for those like others.
SLOW = [losses_leave, one_row_each, tensor_alone, positions, fsdp, in_a_loop]
# What JAX itself cannot differentiate.
NOT_IN_JAX = [(nested, True)]


def both_forms(loss_fn):
    def run(params, batch, directions):
        result = value_grad_and_dots(loss_fn)(params, batch, direction=directions)
        _, grads, late = value_and_dots_fn(loss_fn)(params, batch)
        first = jax.tree.map(lambda leaf: leaf[0], directions)
        return result, late(first), grads, conservation_error(result, directions)

    return jax.jit(run)


@pytest.fixture(scope="module")
def expected():
    direction, batch = directions_like(PARAMS, 2), BATCH
    plain = jax.jit(jax.grad(lambda p, batch: jnp.mean(rows_of(p, batch))))(PARAMS, batch)
    return expected_stacked(rows_of, PARAMS, batch, direction), plain


def compare(loss_fn, expected):
    result, late, grads, errors = both_forms(loss_fn)(PARAMS, BATCH, directions_like(PARAMS, 2))
    dots, plain = expected
    testing.assert_dots_close(result.dots, dots)
    testing.assert_dots_close(late, jax.tree.map(lambda leaf: leaf[0], dots))
    testing.assert_dots_close((result.grads, grads), (plain, plain))
    assert max(np.max(leaf) for leaf in jax.tree.leaves(errors)) <= 1e-5


@pytest.mark.quick(
    "one_row_each_with_more_uses-True",
    "rows_on_the_second_axis-False",
    "every_device_has_a_position-False",
    "copies-False",
    "scattered-True",
    "without_parameters-True",
)
@pytest.mark.parametrize(
    ("case", "check_vma"),
    some_quick(
        [pair for pair in itertools.product(CASES, [True, False]) if pair not in NOT_IN_JAX],
        lambda pair: (CASES.index(pair[0]) % 2 == 0) == pair[1] and pair[0] not in SLOW,
    ),
)
def test_dots(case, check_vma, expected):
    compare(case(check_vma), expected)
