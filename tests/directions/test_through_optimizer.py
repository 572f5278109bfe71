"""Directions through the optimizer, against finite differences of the actual update."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions
from tests.directions.checks import OPTIMIZERS, by_kind, draw_like, warmed_up


@pytest.mark.quick(
    "momentum",
    "adamw",
    "multi_transform",
    "adabelief",
    "nesterov",
    "adam_clipped_afterwards",
    "frozen",
    "nadam",
    "rmsprop",
    "injected",
)
@pytest.mark.filterwarnings("ignore:optax.MultiSteps")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_through_optimizer_against_finite_differences(name, params):
    tx = OPTIMIZERS[name]()
    state = warmed_up(tx, params)
    grads, val_grads, change = (draw_like(params, seed) for seed in (11, 12, 13))

    @jax.jit
    def direction(state, grads, val_grads):
        return directions.through_optimizer(tx, state, params, grads, val_grads)

    @jax.jit
    def effect(state, size):
        moved = jax.tree.map(lambda leaf, way: leaf + size * way, grads, change)
        return optax.tree.vdot(val_grads, tx.update(moved, state, params)[0])

    found = direction(state, grads, val_grads)
    size = 1e-5
    expected = -(effect(state, size) - effect(state, -size)) / (2 * size)
    assert abs(expected) > 1e-5
    np.testing.assert_allclose(optax.tree.vdot(found, change), expected, rtol=1e-6)
    assert directions.count_undefined(tx, state, params, grads) == 0


def test_sgd_is_the_learning_rate_times_the_validation_gradient(params):
    val_grads = draw_like(params, 1)
    tx = optax.sgd(0.25)
    found = directions.through_optimizer(tx, tx.init(params), params, params, val_grads)
    chex.assert_trees_all_close(found, jax.tree.map(lambda leaf: 0.25 * leaf, val_grads))


@pytest.mark.quick("float16")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_small_gradients_are_not_taken_for_zero(dtype, standard_promotion):
    """In float16, too, clipping that does nothing at these gradients does nothing."""
    params, grads, val_grads = (
        jnp.asarray(np.random.default_rng(seed).normal(size=2000) * size, dtype)
        for seed, size in enumerate([1, 1e-2, 1])
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    found = directions.through_optimizer(tx, tx.init(params), params, grads, val_grads)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, val_grads / 2)


@pytest.mark.slow
def test_steps_that_only_gather_have_no_direction(params):
    tx = OPTIMIZERS["accumulated"]()
    with pytest.warns(UserWarning, match=r"optax.MultiSteps: .* all of their rows score 0"):
        found = [
            directions.through_optimizer(tx, warmed_up(tx, params, steps), params, params, params)
            for steps in (2, 3)
        ]
    chex.assert_trees_all_equal(found[0], jax.tree.map(jnp.zeros_like, params))
    assert all(jnp.abs(leaf).min() > 0 for leaf in jax.tree.leaves(found[1]))


def tables(dtype=jnp.float32):
    """A table of which rows 2 and 3 never had a gradient, and a dense weight."""
    params = draw_like({"table": jnp.zeros((4, 3), dtype), "w": jnp.zeros(5, dtype)}, 0)
    grads = draw_like(params, 1)
    grads["table"] = grads["table"].at[2:].set(0)
    return params, grads, draw_like(params, 2)


CLIPPED = {
    "adam": lambda: optax.adam(1e-3),
    "clipped_before": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3)),
    "clipped_after": lambda: optax.chain(optax.adam(1.0), optax.clip_by_global_norm(0.5)),
    "adamw_bfloat16_moments": lambda: optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
}


@pytest.mark.quick("adamw_bfloat16_moments-bfloat16")
@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(CLIPPED, [jnp.float32, jnp.bfloat16])]
)
def test_undefined_coordinates_are_constants_and_counted(name, dtype, standard_promotion):
    """Where gradient and second moment are zero, Adam's derivative is 0 * inf."""
    tx = CLIPPED[name]()
    params, grads, val_grads = tables(dtype)
    state = tx.update(jax.tree.map(lambda leaf: leaf / 3, grads), tx.init(params), params)[1]
    direction = jax.jit(directions.through_optimizer, static_argnums=0)
    found = direction(tx, state, params, grads, val_grads)
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    np.testing.assert_array_equal(found["table"][2:], 0)
    assert jnp.abs(found["w"]).min() > 0
    assert directions.count_undefined(tx, state, params, grads) == 6

    # The same as if the table had no such rows.
    def shorten(tree):
        return jax.tree.map(lambda leaf: leaf[:2] if leaf.shape == (4, 3) else leaf, tree)

    expected = direction(tx, *map(shorten, (state, params, grads, val_grads)))
    rtol = 2e-2 if dtype == jnp.bfloat16 or "bfloat16" in name else 1e-4
    chex.assert_trees_all_close(shorten(found), expected, rtol=rtol)


@pytest.mark.parametrize("name", CLIPPED)
def test_the_first_step_is_finite(name, standard_promotion):
    tx = CLIPPED[name]()
    params, grads, val_grads = tables()
    state = tx.init(params)
    found = directions.through_optimizer(tx, state, params, grads, val_grads)
    chex.assert_tree_all_finite(found)
    assert directions.count_undefined(tx, state, params, grads) == 6


@pytest.mark.parametrize("steps", [2, 7])
def test_radam_begins_when_its_rectification_does(steps, params):
    """A known gap: NaN of a branch that optax.radam does not take."""
    tx = optax.radam(1e-2)
    state = warmed_up(tx, params, steps)
    found = directions.through_optimizer(tx, state, params, params, params)
    assert bool(jnp.isfinite(found["w"]).all()) == (steps == 7)


def test_gradients_of_zero_that_had_others_before(standard_promotion):
    """Where the second moment is not zero, the derivative is that of finite differences."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    params, grads, val_grads = tables()
    state = tx.update(draw_like(params, 5), tx.init(params), params)[1]
    found = directions.through_optimizer(tx, state, params, grads, val_grads)
    assert jnp.abs(found["table"][2:]).min() > 0
    assert directions.count_undefined(tx, state, params, grads) == 0


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_gradients_all_zero(value, standard_promotion):
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
    params, _, val_grads = tables()
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)
    found = directions.through_optimizer(tx, tx.init(params), params, grads, val_grads)
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, params))
    assert directions.count_undefined(tx, tx.init(params), params, grads) == 17


SIGN_BASED = {
    "lion": lambda: optax.lion(1e-3),
    "sign_sgd": lambda: optax.sign_sgd(1e-3),
    "clipped_lion": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
    "jitted": lambda: optax.stateless(
        jax.jit(lambda updates, params: jax.tree.map(jnp.sign, updates))
    ),
    "by_comparison": lambda: optax.stateless_with_tree_map(
        lambda update, param: jnp.where(update > 0, -1.0, 1.0)
    ),
}


@pytest.mark.parametrize("name", SIGN_BASED)
def test_sign_based_updates_are_refused(name, standard_promotion):
    tx = SIGN_BASED[name]()
    params, grads, val_grads = tables()
    with pytest.raises(
        ValueError, match=r"derivative zero(.|\n)*\['table'\]\n(.|\n)*optax.adam for"
    ):
        directions.through_optimizer(tx, tx.init(params), params, grads, val_grads)


def test_an_array_without_elements_is_no_part_that_is_sign_based():
    params, tx = {"empty": jnp.zeros((0, 2)), "w": jnp.ones(2)}, optax.sgd(0.5)
    found = directions.through_optimizer(tx, tx.init(params), params, params, params)
    chex.assert_trees_all_equal(found, jax.tree.map(lambda leaf: 0.5 * leaf, params))


def test_a_part_that_is_sign_based_is_named(params):
    tx = by_kind(optax.adam(1e-2), optax.lion(1e-2))
    with pytest.raises(
        ValueError, match=r"of\n  \['layer'\]\['b'\]\n  \['layer'\]\['s'\]\nalthough"
    ):
        directions.through_optimizer(tx, tx.init(params), params, params, params)


@pytest.mark.quick("multi_transform", "sgd")
@pytest.mark.parametrize("name", ["sgd", "clipped_adamw", "adafactor", "multi_transform"])
def test_stacked_validation_gradients(name, params):
    tx = OPTIMIZERS[name]()
    args = tx, warmed_up(tx, params), params, draw_like(params, 11)
    direction = jax.jit(directions.through_optimizer, static_argnums=0)
    several = [draw_like(params, seed) for seed in (1, 2, 3)]
    for count in (3, 1):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several[:count])
        found = direction(*args, stacked)
        each = [direction(*args, one) for one in several[:count]]
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        chex.assert_trees_all_close(found, expected, rtol=1e-10)


def test_stacked_gradients_that_do_not_fit(params):
    tx = optax.sgd(0.1)
    args = tx, tx.init(params), params
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    with pytest.raises(ValueError, match=r"val_grads must have the shapes and dtypes.*\(or, all"):
        directions.through_optimizer(*args, params, {**stacked, "w": params["w"]})
    with pytest.raises(ValueError, match="grads must have the shapes and dtypes"):
        directions.through_optimizer(*args, stacked, stacked)


def test_arguments_of_the_transformation(params):
    """What optax's transformations with extra arguments need is passed on."""
    tx = optax.polyak_sgd()
    found = directions.through_optimizer(
        tx, tx.init(params), params, params, params, value=jnp.asarray(2.0)
    )
    chex.assert_tree_all_finite(found)


@pytest.mark.parametrize(("position", "name"), [(3, "grads"), (4, "val_grads")])
def test_trees_that_do_not_fit(position, name, params):
    args = [optax.sgd(0.1), optax.sgd(0.1).init(params), params, params, params]
    args[position] = {"w": params["w"]}
    with pytest.raises(ValueError, match=f"{name} must be a tree like the parameters"):
        directions.through_optimizer(*args)
