"""Differential equations of diffrax with its default adjoint, whose steps each row chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots
from ghostjax._errors import RowAxisError

pytestmark = pytest.mark.slow
diffrax = pytest.importorskip("diffrax", reason="diffrax is not installed")
PARAMS = {
    "w": jnp.array([[0.3, -0.8], [0.7, 0.2]]),
    "b": jnp.array([0.1, -0.2]),
    "out": jnp.array([1.0, -0.5]),
}
BATCH = {
    "start": jnp.array([[1.0, 0.5], [-2.0, 1.5], [0.2, -3.0]]),
    "target": jnp.array([0.3, -0.4, 0.8]),
}


def loss_of_row(params, row):
    def field(t, y, params):
        return jnp.tanh(params["w"] @ y + params["b"]) * (1 + t)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        0.0,
        1.0,
        0.1,
        row["start"],
        args=params,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
    )
    return jnp.square(jnp.sum(params["out"] * solution.ys[-1]) - row["target"])


def test_a_loss_for_one_row():
    direction = jax.tree.map(
        lambda leaf: jnp.cos(1 + jnp.arange(leaf.size)).reshape(leaf.shape), PARAMS
    )
    fn = value_grad_and_dots(loss_of_row, per_example=True)
    result = jax.jit(lambda params, batch, v: fn(params, batch, direction=v))(
        PARAMS, BATCH, direction
    )
    grad = jax.jit(jax.grad(loss_of_row))
    grads = [grad(PARAMS, {name: leaf[row] for name, leaf in BATCH.items()}) for row in range(3)]
    expected = {
        name: np.array([np.vdot(own[name], direction[name]) for own in grads]) for name in PARAMS
    }
    testing.assert_dots_close(result.dots, expected, rtol=1e-5)
    assert max(jax.tree.leaves(conservation_error(result, direction))) < 1e-5


def test_all_rows_at_once_names_the_way_out():
    def loss_fn(params, batch):
        return jnp.mean(jax.vmap(loss_of_row, (None, 0))(params, batch))

    with pytest.raises(RowAxisError, match="per_example=True"):
        value_grad_and_dots(loss_fn)(PARAMS, BATCH, direction=PARAMS)
