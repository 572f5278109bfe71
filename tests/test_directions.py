"""Directions against finite differences of the actual update and of the actual loss."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions, testing, value_grad_and_dots

STEPS = 7


def draw_like(params, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), params
    )


@pytest.fixture
def params():
    """In float64, for finite differences."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield draw_like(
            {"w": jnp.zeros((4, 3)), "layer": {"b": jnp.zeros(3), "s": jnp.zeros(())}}, 0
        )


def schedule(count):
    return 0.1 / (1 + count)


def by_kind(first, second):
    labels = {"w": "first", "layer": {"b": "second", "s": "second"}}
    return optax.multi_transform({"first": first, "second": second}, labels)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(schedule, weight_decay=0.1),
    "clipped_adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.1)
    ),
    "adam_clipped_afterwards": lambda: optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-0.1)
    ),
    "clipping_that_does_nothing": lambda: optax.chain(
        optax.clip_by_global_norm(1e3), optax.sgd(0.1)
    ),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "multi_transform": lambda: by_kind(optax.adam(1e-2), optax.sgd(0.1)),
    "frozen": lambda: by_kind(optax.adam(1e-2), optax.set_to_zero()),
    "nadam": lambda: optax.nadam(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "adagrad": lambda: optax.adagrad(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule),
    "if_finite": lambda: optax.apply_if_finite(by_kind(optax.adam(1e-2), optax.set_to_zero()), 3),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
}


def warmed_up(tx, params, steps=STEPS):
    """The state after some steps, so that moments are not zero."""
    state = tx.init(params)
    for seed in range(1, steps + 1):
        _, state = tx.update(draw_like(params, seed), state, params)
    return state


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


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
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


def test_a_part_that_is_sign_based_is_named(params):
    tx = by_kind(optax.adam(1e-2), optax.lion(1e-2))
    with pytest.raises(
        ValueError, match=r"of\n  \['layer'\]\['b'\]\n  \['layer'\]\['s'\]\nalthough"
    ):
        directions.through_optimizer(tx, tx.init(params), params, params, params)


@pytest.mark.parametrize("name", ["sgd", "clipped_adamw", "adafactor", "multi_transform"])
def test_stacked_validation_gradients(name, params):
    tx = OPTIMIZERS[name]()
    args = tx, warmed_up(tx, params), params, draw_like(params, 11)
    several = [draw_like(params, seed) for seed in (1, 2, 3)]
    for count in (3, 1):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several[:count])
        found = directions.through_optimizer(*args, stacked)
        each = [directions.through_optimizer(*args, one) for one in several[:count]]
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


def losses_of(params, x):
    return jnp.mean(
        jnp.square(jnp.tanh(x @ params["w"]) * params["layer"]["s"] + params["layer"]["b"][None]),
        axis=1,
    )


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
