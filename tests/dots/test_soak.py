"""Thousands of steps in one process: memory stays flat, and nothing is compiled again."""

import gc
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import InRunValues, directions, value_and_dots_fn, value_grad_and_dots
from models.arrays import draw, mean_squares

B, T, WIDTH, EXAMPLES = 8, 4, 16, 64
PARAMS = {"first": draw(WIDTH, WIDTH) / 4, "bias": draw(WIDTH), "second": draw(WIDTH, WIDTH) / 4}
DATA, VAL = draw(EXAMPLES, T, WIDTH, seed=1), draw(4, T, WIDTH, seed=2)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def loss_fn(params, x):
    h = jnp.tanh(x @ params["first"] + params["bias"][None, None])
    return jnp.mean(mean_squares(h @ params["second"] - x))


@jax.jit
def late_step(params, state, values, x, ids):
    """Through the optimizer, at the midpoint."""
    _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
    updates, after = TX.update(grads, state, params)
    val_grads = directions.midpoint(loss_fn, params, updates, VAL)
    direction = directions.through_optimizer(TX, state, params, grads, val_grads)
    values = values.add(ids, dots.result(direction).total() / B)
    return optax.apply_updates(params, updates), after, values


@jax.jit
def early_step(params, state, values, x, ids):
    direction = jax.grad(loss_fn)(params, VAL)
    result = value_grad_and_dots(loss_fn, norms=True)(params, x, direction=direction)
    updates, state = TX.update(result.grads, state, params)
    values = values.add(ids, result.cosine(direction))
    return optax.apply_updates(params, updates), state, values


def resident() -> int:
    """Bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"
)
@pytest.mark.parametrize("step", [late_step, early_step], ids=["late", "early"])
def test_two_thousand_steps(step, caplog, standard_promotion):
    generator = np.random.default_rng(3)

    def run(count, state):
        for _ in range(count):
            ids = generator.choice(EXAMPLES, B, replace=False).astype(np.int32)
            state = step(*state, np.asarray(DATA)[ids], ids)
        return jax.block_until_ready(state)

    start = PARAMS, TX.init(PARAMS), InRunValues.zeros(EXAMPLES)
    state = run(200, start)
    gc.collect()
    before, arrays = resident(), len(jax.live_arrays())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state = run(2000, state)
    gc.collect()
    assert [record.message for record in caplog.records if "ompil" in record.message] == []
    assert step._cache_size() == 1
    assert len(jax.live_arrays()) == arrays
    assert resident() - before < 2**21  # 1 kB a step
    visits = state[2].visits
    assert int(visits.sum()) == 2200 * B
    assert np.isfinite(state[2].of("val")).all()


def test_what_is_compiled_again_would_be_seen(caplog):
    """By the log and by the size of the cache."""
    step = jax.jit(
        lambda x: (
            value_grad_and_dots(lambda w, x: jnp.mean(x @ w))(
                jnp.ones(3), x, direction=jnp.ones(3)
            ).dots
        )
    )
    step(jnp.ones((2, 3)))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        step(jnp.ones((4, 3)))
    assert any("ompil" in record.message for record in caplog.records)
    assert step._cache_size() == 2
