"""Scores of directions, against finite differences of the actual loss; several directions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions, testing, value_grad_and_dots
from tests.directions.checks import OPTIMIZERS, draw_like, losses_of, warmed_up


@pytest.mark.quick("sgd", "momentum", "multi_transform")
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "clipped_adamw", "adafactor", "multi_transform"]
)
def test_scores_predict_what_leaving_a_row_out_changes(name, params):
    """dots / B is the derivative of the validation loss after the step in the weight of a row."""
    tx = OPTIMIZERS[name]()
    state = warmed_up(tx, params)
    x, val_x = (jnp.asarray(np.random.default_rng(seed).normal(size=(5, 4))) for seed in (20, 21))
    weights = jnp.ones(5)

    def loss_fn(params, batch):
        return jnp.mean(losses_of(params, batch["x"]) * batch["weights"])

    val = {"x": val_x, "weights": weights}

    @jax.jit
    def after(weights):
        grads = jax.grad(loss_fn)(params, {"x": x, "weights": weights})
        updates = tx.update(grads, state, params)[0]
        return loss_fn(optax.apply_updates(params, updates), val), grads, updates

    @jax.jit
    def scores(grads, updates):
        # A row's weight is taken away a little, when all others are in: look-ahead is exact.
        val_grads = directions.look_ahead(loss_fn, params, updates, val)
        direction = directions.through_optimizer(tx, state, params, grads, val_grads)
        batch = {"x": x, "weights": weights}
        return value_grad_and_dots(loss_fn)(params, batch, direction=direction).total() / 5

    _, grads, updates = after(weights)
    size = 1e-5
    changes = [
        (after(weights.at[row].add(-size))[0] - after(weights.at[row].add(size))[0]) / (2 * size)
        for row in range(5)
    ]
    testing.assert_dots_close(scores(grads, updates), np.array(changes), rtol=1e-6)


@pytest.mark.quick("False")
@pytest.mark.parametrize("per_example", [False, True])
def test_stacked_directions_give_value_and_gradient_once(per_example, params):
    x = jnp.asarray(np.random.default_rng(20).normal(size=(5, 4)))

    def loss_fn(params, x):
        losses = losses_of(params, x[None] if per_example else x)
        return losses.mean(), x.sum()

    fn = value_grad_and_dots(loss_fn, has_aux=True, per_example=per_example)
    several = [draw_like(params, seed) for seed in (1, 2, 3)]
    direction = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    result = jax.jit(directions.stacked(fn))(params, x, direction=direction)
    rows = testing.per_example_grads(losses_of, params, x)
    for total, vector in zip(result.total(), several, strict=True):
        products = jax.tree.map(lambda leaf, v: np.tensordot(leaf, v, v.ndim), rows, vector)
        testing.assert_dots_close(total, sum(jax.tree.leaves(products)), rtol=1e-10)
        one = fn(params, x, direction=vector)
        chex.assert_trees_all_close(
            (result.value, result.aux, result.grads), (one.value, one.aux, one.grads), rtol=1e-10
        )
    with pytest.raises(ValueError, match="direction must have a leading axis K on every leaf"):
        directions.stacked(fn)(params, x, direction=several[0])
