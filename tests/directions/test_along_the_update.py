"""Validation gradients at a point of the update: midpoint and look-ahead."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions, testing, value_grad_and_dots
from tests.directions.checks import draw_like, losses_of


def quadratic(params, curvature):
    """A loss of which the gradient half-way tells all."""
    flat, _ = jax.flatten_util.ravel_pytree(params)
    return flat @ curvature @ flat / 2 + flat.sum()


@pytest.fixture
def curvature():
    return jnp.asarray(np.random.default_rng(3).normal(size=(16, 16))) / 4


def shares_of_rows(params):
    """A batch of 4 rows, their own gradients, and a learning rate at which curvature matters."""
    x = jnp.asarray(np.random.default_rng(20).normal(size=(4, 4)))
    rows = testing.per_example_grads(losses_of, params, x)
    return x, [jax.tree.map(lambda leaf, row=row: leaf[row], rows) for row in range(4)], 20.0


def midpoint_scores(params, x, learning_rate, curvature):
    def loss_fn(params, x):
        return losses_of(params, x).mean()

    tx, grads = optax.sgd(learning_rate), jax.grad(loss_fn)(params, x)
    updates, _ = tx.update(grads, tx.init(params), params)
    val_grads = directions.midpoint(quadratic, params, updates, curvature)
    direction = directions.through_optimizer(tx, tx.init(params), params, grads, val_grads)
    result = value_grad_and_dots(loss_fn)(params, x, direction=direction)
    return result.total() / len(x), updates


@pytest.mark.slow
def test_midpoint_scores_add_up_to_the_actual_decrease(params, curvature):
    x, _, learning_rate = shares_of_rows(params)
    scores, updates = midpoint_scores(params, x, learning_rate, curvature)
    before = quadratic(params, curvature)
    after = quadratic(optax.apply_updates(params, updates), curvature)
    first_order = -optax.tree.vdot(jax.grad(quadratic)(params, curvature), updates)
    assert abs(first_order - (before - after)) > 0.1 * abs(before - after)
    np.testing.assert_allclose(scores.sum(), before - after, rtol=1e-10)


def test_midpoint_scores_are_shapley_values(params, curvature):
    """Each row's mean contribution over all orders in which rows can join the update."""
    x, rows, learning_rate = shares_of_rows(params)
    scores, _ = midpoint_scores(params, x, learning_rate, curvature)
    loss = jax.jit(quadratic)
    expected = np.zeros(4)
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        moved = params
        for row in order:
            before = loss(moved, curvature)
            moved = jax.tree.map(
                lambda leaf, grad: leaf - learning_rate * grad / 4, moved, rows[row]
            )
            expected[row] += (before - loss(moved, curvature)) / len(orders)
    testing.assert_dots_close(scores, expected, rtol=1e-10)


def test_midpoint_is_the_formula_of_in_run_shapley(params, curvature):
    """v = grad_val - lr/2 H g for a step of gradient descent and a quadratic loss."""
    grads = draw_like(params, 1)
    updates = jax.tree.map(lambda leaf: -0.3 * leaf, grads)
    found = directions.midpoint(quadratic, params, updates, curvature)
    flat, unravel = jax.flatten_util.ravel_pytree(grads)
    matrix = (curvature + curvature.T) / 2
    expected = jax.tree.map(
        lambda grad, product: grad - 0.15 * product,
        jax.grad(quadratic)(params, curvature),
        unravel(matrix @ flat),
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-10)


def test_what_the_midpoint_misses_is_of_third_order(params):
    """For a loss of third degree, 1/24 of its third derivative along the update."""
    updates = draw_like(params, 1)

    def loss_fn(params):
        return sum(jnp.sum(leaf**3 + leaf**2) for leaf in jax.tree.leaves(params))

    found = directions.midpoint(loss_fn, params, updates)
    change = loss_fn(optax.apply_updates(params, updates)) - loss_fn(params)
    third = sum(6 * jnp.sum(leaf**3) for leaf in jax.tree.leaves(updates))
    np.testing.assert_allclose(change - optax.tree.vdot(found, updates), third / 24, rtol=1e-10)


ALONG = {"midpoint": (directions.midpoint, 0.5), "look_ahead": (directions.look_ahead, 1.0)}


@pytest.mark.quick("float32-look_ahead", "bfloat16-look_ahead")
@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_that_at_a_point_of_the_update(name, dtype, standard_promotion):
    function, part = ALONG[name]
    params = draw_like({"w": jnp.zeros((4, 3), dtype), "b": jnp.zeros(3, dtype)}, 0)
    updates, x = draw_like(params, 1), jnp.asarray(np.ones((2, 4)), dtype)

    def loss_fn(params, x, *, power):
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** power)

    found = function(loss_fn, params, updates, x, power=3)
    point = optax.apply_updates(params, jax.tree.map(lambda leaf: part * leaf, updates))
    expected = jax.grad(loss_fn)(point, x, power=3)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    chex.assert_trees_all_equal(found, expected)


def half_of_squares(params):
    """Its gradient is where it is taken."""
    return sum(jnp.sum(leaf * leaf) / 2 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize(
    ("dtype", "update_dtype"),
    [
        (jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.bfloat16),
    ],
)
def test_the_point_is_rounded_once(name, dtype, update_dtype):
    """To the number nearest to the exact sum; with strict promotion of dtypes, too."""
    function, part = ALONG[name]
    params = draw_like({"w": jnp.zeros(1000, dtype)}, 0)
    updates = draw_like({"w": jnp.zeros(1000, update_dtype)}, 1)
    found = function(half_of_squares, params, updates)["w"]
    exact = np.float64(params["w"]) + part * np.float64(updates["w"])
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), exact.astype(dtype))
    with jax.numpy_dtype_promotion("standard"):
        step = jax.tree.map(lambda leaf: part * leaf, updates)
        chex.assert_trees_all_equal(found, optax.apply_updates(params, step)["w"])


def test_updates_are_not_rounded_before_they_are_added():
    """Numbers of bfloat16 near 256 are 2 apart; the last update is 2 if rounded to it."""
    params = {"w": jnp.full(3, 256, jnp.bfloat16)}
    updates = {"w": jnp.asarray([1.9, 2.1, 2 + 2**-8], jnp.float32)}
    found = directions.midpoint(half_of_squares, params, updates)["w"]
    np.testing.assert_array_equal(np.float32(found), [256, 258, 258])


@pytest.mark.parametrize("name", ALONG)
def test_updates_and_parameters_that_do_not_fit(name, params, curvature):
    function, _ = ALONG[name]
    with pytest.raises(ValueError, match="updates must be a tree like the parameters"):
        function(quadratic, params, {"w": params["w"]}, curvature)
    counted = {"count": jnp.arange(3)}
    with pytest.raises(TypeError, match=r"real floating-point(.|\n)*\['count'\]: int"):
        function(half_of_squares, counted, counted)
