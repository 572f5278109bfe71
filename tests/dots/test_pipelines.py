"""Stages on devices of their own inside ``jax.shard_map``: at one moment each has other rows."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import direction_like, draw
from tests.dots.checks import expected_dots, expected_stacked

STAGES, MICRO, T, D = 2, 3, 2, 4
PARAMS = {"w": draw(STAGES, D, D, seed=1), "b": draw(STAGES, D, seed=2), "out": draw(D, seed=3)}
SPECS = {"w": P("stage"), "b": P("stage"), "out": P()}


def layer(w, b, x):
    return jnp.tanh(x @ w + jnp.broadcast_to(b, x.shape))


def row_losses(p, x):
    for stage in range(STAGES):
        x = layer(p["w"][stage], p["b"][stage], x)
    return jnp.square(x @ p["out"])


def tick(p, x, passed, k):
    """All stages at once; what comes out, and what the next stage gets of it."""
    stage = jax.lax.axis_index("stage")
    own = jnp.where(stage == 0, x[jnp.minimum(k, MICRO - 1)], passed)
    done = layer(p["w"][0], p["b"][0], own)
    return jax.lax.ppermute(done, "stage", [(k, (k + 1) % STAGES) for k in range(STAGES)]), done


def unrolled(p, x, start):
    done = []
    for k in range(MICRO + STAGES - 1):
        start, own = tick(p, x, start, k)
        done.append(own)
    return jnp.stack(done)


def scanned(p, x, start):
    ticks = jnp.arange(MICRO + STAGES - 1)
    return jax.lax.scan(jax.checkpoint(lambda c, k: tick(p, x, c, k)), start, ticks)[1]


def pipeline(run, data=1, *, check_vma=True, is_masked=True, inside=False):
    """The loss of all rows, [B, T, D]; ``data`` is the number of pipelines side by side."""
    mesh = jax.make_mesh((data, STAGES), ("data", "stage"), (jax.sharding.AxisType.Auto,) * 2)
    rows = P("data") if data > 1 else P()

    def body(p, x):
        x = x.reshape(MICRO, -1, *x.shape[1:])
        start = jnp.zeros_like(x[0])
        if check_vma:
            start = jax.lax.pcast(start, "stage", to="varying")
        done = run(p, x, start)[STAGES - 1 :].reshape(-1, *x.shape[2:])
        is_last = jax.lax.axis_index("stage") == STAGES - 1
        done = jax.lax.psum(jnp.where(is_last, done, 0) if is_masked else done, "stage")
        losses = jnp.square(done @ p["out"])
        return jnp.mean(losses) if inside else losses

    out = P() if inside else rows
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(SPECS, rows), out_specs=out, check_vma=check_vma
    )
    return lambda p, x: jnp.mean(mapped(p, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "options"),
    [
        (scanned, {}),
        (unrolled, {"inside": True}),
        pytest.param(unrolled, {"check_vma": False}, marks=pytest.mark.slow),
        pytest.param(scanned, {"data": 2}, marks=pytest.mark.slow),
    ],
    ids=["scanned", "loss_inside", "unchecked", "beside_another"],
)
def test_rows_are_those_of_one_device(run, options):
    loss = pipeline(run, **options)
    x = draw(2 * MICRO * options.get("data", 1), T, D, seed=4)
    direction = direction_like(PARAMS)
    result = jax.jit(lambda p, x, v: value_grad_and_dots(loss)(p, x, direction=v))(
        PARAMS, x, direction
    )
    expected = expected_dots(lambda p, x: jnp.mean(row_losses(p, x), axis=-1), PARAMS, x, direction)
    testing.assert_dots_close(result.dots, expected, rtol=1e-5)
    testing.assert_dots_close(result.grads, jax.jit(jax.grad(loss))(PARAMS, x), rtol=1e-6)


@pytest.mark.slow
def test_late_directions():
    x, directions = draw(2 * MICRO, T, D, seed=4), jax.tree.map(lambda p: draw(2, *p.shape), PARAMS)

    @jax.jit
    def run(p, x, directions):
        return value_and_dots_fn(pipeline(scanned), remat=True)(p, x)[2](directions)

    found = run(PARAMS, x, directions)
    expected = expected_stacked(
        lambda p, x: jnp.mean(row_losses(p, x), axis=-1), PARAMS, x, directions
    )
    testing.assert_dots_close(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_positions_are_told_apart():
    x = draw(2 * MICRO, T, D, seed=4)
    direction, labels = direction_like(PARAMS), jnp.arange(2 * MICRO * T).reshape(-1, T)

    @jax.jit
    def run(p, x, v):
        fn = value_grad_and_dots(pipeline(scanned))
        return fn(p, x, direction=v, labels=labels, num_labels=labels.size)

    found = run(PARAMS, x, direction)
    flat = expected_dots(row_losses, PARAMS, x.reshape(-1, D), direction)
    testing.assert_dots_close(found.dots, jax.tree.map(lambda leaf: leaf / T, flat), rtol=1e-5)


def test_stages_that_are_all_added_up_are_counted():
    loss, x = pipeline(unrolled, is_masked=False), draw(2 * MICRO, T, D, seed=4)
    run = jax.jit(lambda p, x: value_grad_and_dots(loss)(p, x, direction=p))
    result = run(PARAMS, x)
    assert int(result.conflicts) > 0
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(result.dots))
