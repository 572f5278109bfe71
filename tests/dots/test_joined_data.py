"""Examples that are put together from hidden values and from data that parameters have not met."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax import value_grad_and_dots
from models.arrays import draw
from tests.dots.checks import check_loss

B, F, FIRST = 6, 4, 2
PARAMS = {"w": draw(F, F), "u": draw(F, F, seed=1)}
BATCH = {"x": draw(B, F, seed=3), "number": jnp.arange(B)}


def hidden(p, x):
    return jnp.tanh(x @ p["w"])


def last(p, h):
    return jnp.sum(jnp.sin(h @ p["u"]), -1)


def rows(p, batch):
    is_first = (batch["number"] < FIRST)[:, None]
    return last(p, jnp.where(is_first, hidden(p, batch["x"]), batch["x"]))


def concatenated(p, x):
    return jnp.concatenate([x[FIRST:][::-1], hidden(p, x[:FIRST])])


def stacked(p, x):
    return jnp.stack([hidden(p, x[k]) if k < FIRST else x[k] for k in range(B)])


def updated(p, x):
    return jax.lax.dynamic_update_slice(x, hidden(p, x[:FIRST]), (0, 0))


def scattered(p, x):
    order = jnp.arange(FIRST)[::-1]
    return x.at[order].set(hidden(p, x[order]))


def pipelined(p, batch):
    """Stages side by side, each with a row of its own."""

    def step(stages, row):
        weights = jnp.stack([p["w"], p["u"]])
        stages = jnp.einsum("sf,sfg->sg", stages.at[0].set(row), weights)
        return jnp.roll(stages, 1, 0), stages[1]

    padded = jnp.concatenate([batch["x"], jnp.zeros((1, F))])
    return jnp.sum(jnp.sin(jax.lax.scan(step, jnp.zeros((2, F)), padded)[1][1:])) / B


def selected(p, batch):
    order = jnp.argsort(batch["x"][:, 0])
    x, is_first = batch["x"][order], batch["number"][order] < FIRST
    return jnp.mean(last(p, jnp.where(is_first[:, None], hidden(p, x), x)))


CASES = {
    "selected": (selected, rows),
    "pipelined": (pipelined, lambda p, batch: jnp.sin(batch["x"] @ p["w"] @ p["u"]).sum(-1)),
}
CASES |= {
    put.__name__: ((lambda p, batch, put=put: jnp.mean(last(p, put(p, batch["x"])))), rows)
    for put in (concatenated, stacked, updated, scattered)
}


@pytest.mark.quick("concatenated", "updated", "scattered", "stacked")
@pytest.mark.parametrize("name", CASES)
def test_examples_put_together_from_hidden_values_and_data(name):
    check_loss(*CASES[name], PARAMS, BATCH, exact_gradient=False)


def selected_in_parts(p, batch):
    """Features of one row, and of another's hidden values."""
    order = jnp.argsort(batch["x"][:, 0])
    h = jnp.where(jnp.arange(F)[None] == 0, batch["x"][order[::-1]], hidden(p, batch["x"][order]))
    return jnp.mean(last(p, h))


def test_what_cannot_be_told_apart_is_counted():
    fn = value_grad_and_dots(selected_in_parts)
    run = jax.jit(lambda p, batch: fn(p, batch, direction=p))
    result = run(PARAMS, BATCH)
    assert int(result.conflicts) > 0
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(result.dots))
