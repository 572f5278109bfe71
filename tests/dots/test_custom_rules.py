"""Derivative rules that are not what the function says: dots follow the rules, or refuse them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots
from models.arrays import FEATURES, ROWS, activations, direction_like, draw, mean_squares
from tests.dots.checks import one_by_one
from tests.dots.rules import PARAMS, RULES, clip, contract, product_with
from tests.variants import crossed, some_quick


def scaled(losses, size):
    return lambda params, batch: losses(params, batch) / size


@pytest.mark.parametrize(("name", "reduction"), crossed(RULES, ["mean", "sum"]))
def test_rules_that_are_not_linear(name, reduction):
    """A row's dot is what the rule gives for its share of the loss."""
    losses, params, batch = RULES[name]()
    size = jax.tree.leaves(batch)[0].shape[0] if reduction == "mean" else 1
    losses = scaled(losses, size)
    direction = direction_like(params)
    fn = value_grad_and_dots(lambda p, b: jnp.sum(losses(p, b)), loss_reduction=reduction)
    result = jax.jit(fn)(params, batch, direction=direction)
    shares = one_by_one(losses, params, batch, direction)
    expected = jax.tree.map(lambda leaf: leaf * size, shares)
    testing.assert_dots_close(result.dots, expected)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


@pytest.mark.parametrize("name", some_quick(RULES, lambda name: name in [*RULES][::3]))
def test_rules_that_are_not_linear_per_example(name):
    losses, params, batch = RULES[name]()
    direction = direction_like(params)

    def one(params, row):
        return losses(params, jax.tree.map(lambda leaf: leaf[None], row))[0]

    fn = value_grad_and_dots(one, per_example=True, loss_reduction="sum")
    result = jax.jit(fn)(params, batch, direction=direction)
    testing.assert_dots_close(result.dots, one_by_one(losses, params, batch, direction))
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def test_one_row():
    losses, params, batch = RULES["normalised"]()
    batch, direction = batch[:1], direction_like(params)
    fn = value_grad_and_dots(lambda p, b: jnp.mean(losses(p, b)))
    dots = jax.jit(fn)(params, batch, direction=direction).dots
    testing.assert_dots_close(dots, one_by_one(losses, params, batch, direction))


@pytest.mark.parametrize("name", ["clipped", "sign", "scale_and_shift"])
def test_rules_in_bfloat16(name, standard_promotion):
    losses, params, batch = RULES[name]()
    params, batch, direction = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), (params, batch, direction_like(params))
    )
    fn = value_grad_and_dots(lambda p, b: jnp.sum(losses(p, b)), loss_reduction="sum")
    dots = jax.jit(fn)(params, batch, direction=direction).dots
    testing.assert_dots_close(dots, one_by_one(losses, params, batch, direction), rtol=1e-2)


def test_stacked_directions_through_a_rule():
    losses, params, batch = RULES["clipped"]()
    direction = direction_like(params)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), direction)
    fn = value_grad_and_dots(lambda p, b: jnp.mean(losses(p, b)))
    many = jax.jit(jax.vmap(lambda v: fn(params, batch, direction=v).dots))(stacked)
    single = jax.jit(fn)(params, batch, direction=direction).dots
    for place, factor in enumerate([1, 2, -1]):
        testing.assert_dots_close(
            jax.tree.map(lambda leaf, place=place: leaf[place], many),
            jax.tree.map(lambda leaf, factor=factor: factor * leaf, single),
        )


def integers(x, w, g):
    x, g = jnp.round(x * 8).astype(jnp.int8), jnp.round(g * 8).astype(jnp.int8)
    total = jnp.einsum("bti,bto->io", x, g, preferred_element_type=jnp.int32)
    return g.astype(jnp.float32) @ w.T, total.astype(jnp.float32)


def until_small(x, w, g):
    total = contract(x, g)
    return g @ w.T, jax.lax.while_loop(lambda t: jnp.sum(t**2) > 1, lambda t: t / 2, total)


def positions_for_rows(x, w, g):
    """As many positions as rows: x of row i meets the cotangent of position i."""
    return g @ w.T, jnp.einsum("bti,tbo->io", x, g)


def looped_with_other_rows(x, w, g):
    def add(total, pair):
        return total + pair[0][::-1].T @ pair[1], None

    pairs = jnp.swapaxes(x, 0, 1), jnp.swapaxes(g, 0, 1)
    return g @ w.T, jax.lax.scan(add, jnp.zeros_like(w), pairs)[0]


def branch_with_other_rows(x, w, g):
    branches = contract, lambda x, g: contract(x[::-1], g)
    return g @ w.T, jax.lax.cond(w[0, 0] < 9, *branches, x, g)


# Rules whose gradient of a parameter is no sum over rows: what is said, and of which operation.
REFUSED = {
    "norm_of_the_batch": (
        lambda x, w, g: (g @ w.T, contract(x, g / jnp.linalg.norm(g))),
        r"in the backward rule of custom_vjp_call at .*test_custom_rules\.py:\d+ \(product at "
        r".*/rules\.py:\d+\): div combines rows with a value in which rows are mixed \(reduce_sum",
    ),
    "largest_of_the_batch": (
        lambda x, w, g: (g @ w.T, contract(x, jnp.round(g * 8 / jnp.max(jnp.abs(g))))),
        r"div combines rows with a value in which rows are mixed \(reduce_max",
    ),
    "clipped_sum": (
        lambda x, w, g: (g @ w.T, jnp.clip(contract(x, g), -0.05, 0.05)),
        r"custom_vjp_call at .*gives parameter \['w'\] must be a sum over rows.* Found max,"
        r" which is not.*per_example=True",
    ),
    "normalised_sum": (
        lambda x, w, g: (g @ w.T, contract(x, g) / jnp.linalg.norm(contract(x, g))),
        r"Found (square|mul|integer_pow), which is not",
    ),
    "decayed": (
        lambda x, w, g: (g @ w.T, contract(x, g) + w),
        r"Found add, which is not",
    ),
    "constant": (lambda x, w, g: (g @ w.T, w), "Found a part that depends on no cotangent, which"),
    "integers": (integers, "Found dot_general, which is not"),
    "until_small": (until_small, "Found while, which is not"),
    "covariance": (
        lambda x, w, g: (g @ w.T, contract(x, g) @ jnp.einsum("bti,bto->io", g, g)),
        r"dot_general combines rows with other rows",
    ),
    "other_rows": (
        lambda x, w, g: (g @ w.T, contract(x[::-1], g)),
        r"dot_general sums over rows and pairs them with other rows.*per_example=True",
    ),
    "positions_for_rows": (positions_for_rows, "sums over rows and pairs them with other rows"),
    "other_rows_in_a_loop": (looped_with_other_rows, "pairs them with other rows"),
    "other_rows_in_a_branch": (branch_with_other_rows, "pairs them with other rows"),
    "added_rows": (
        lambda x, w, g: (
            g @ w.T,
            jnp.sum(g.sum(0, keepdims=True) * x[..., :1], (0, 1))[None] + 0 * w,
        ),
        "combines rows with a value in which rows are mixed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rules_that_give_no_sum_over_rows(name):
    backward, message = REFUSED[name]
    product = product_with(backward)

    def losses(params, x):
        return mean_squares(product(x, params["w"]) @ params["head"])

    x = draw(ROWS, ROWS, FEATURES, seed=1)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))
    with pytest.raises(ValueError, match=message):
        fn(PARAMS, x, direction=PARAMS)
    if name == "norm_of_the_batch":
        losses = scaled(losses, ROWS)
        fn = value_grad_and_dots(
            lambda p, x: losses(p, x[None])[0], per_example=True, loss_reduction="sum"
        )
        result = jax.jit(fn)(PARAMS, x, direction=direction_like(PARAMS))
        testing.assert_dots_close(
            result.dots, one_by_one(losses, PARAMS, x, direction_like(PARAMS))
        )


def test_a_rule_whose_forward_part_mixes_rows():
    """What only the rule keeps of activations counts, too, if gradient flows through them."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        return x @ w, (x - x.mean(axis=0, keepdims=True), w)

    product.defvjp(forward, lambda kept, g: (g @ kept[1].T, contract(kept[0], g)))

    def loss_fn(params, x):
        return jnp.mean(jnp.square(product(jnp.tanh(product(x, params["w"])), params["w"].T)))

    message = r"in the backward rule of custom_vjp_call at .*sub .*rows are mixed \(reduce_sum"
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(loss_fn)(PARAMS, activations(), direction=PARAMS)


def passed_with(backward):
    passed = jax.custom_vjp(lambda tree: tree)
    passed.defvjp(lambda tree: (tree, tree), lambda tree, g: (jax.tree.map(backward, tree, g),))
    return passed


ON_PARAMETERS = {
    "clipped": (lambda w, g: clip(g), "Found max, which is not"),
    "decayed": (lambda w, g: g + w, "Found add, which is not"),
    "constant": (
        lambda w, g: jnp.ones_like(w),
        "Found a part that depends on no cotangent, which is not",
    ),
}


@pytest.mark.parametrize("per_example", [False, True], ids=["rows", "per_example"])
@pytest.mark.parametrize("name", ON_PARAMETERS)
def test_rules_of_parameters_alone(name, per_example):
    """They see the gradient summed over rows, whatever is vectorized."""
    backward, message = ON_PARAMETERS[name]
    passed = passed_with(backward)

    def loss_fn(params, x):
        params = jax.jit(passed)(params)
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) @ params["head"]))

    message = (
        r"custom_vjp_call \(<lambda> at .*test_custom_rules\.py:\d+\) is a custom_vjp function of "
        rf"parameters alone \(\['\w+'\]\).*{message}"
    )
    fn = value_grad_and_dots(loss_fn, per_example=per_example)
    with pytest.raises(NotImplementedError, match=message):
        fn(PARAMS, activations(), direction=PARAMS)


def test_linear_rules_of_parameters_alone():
    """Scaled, masked, mixed and stopped gradients, also of a function that closes over an array."""
    scales = np.linspace(1, 2, PARAMS["w"].size, dtype=np.float32).reshape(PARAMS["w"].shape)
    scaled = jax.custom_vjp(lambda w: w * scales)
    scaled.defvjp(lambda w: (w * scales, None), lambda _, g: (g * scales / 2,))

    def backward(w, g):
        g = jnp.where(w > 0, g, 0) * 3 + jax.lax.stop_gradient(jnp.roll(g, 1, axis=0))
        return jax.lax.cond(w[0, 0] > 9, jnp.zeros_like, lambda g: g / 2, g)

    passed = passed_with(backward)

    def losses(params, x):
        params = passed(params)
        return mean_squares(jnp.tanh(x @ scaled(params["w"])) @ params["head"])

    direction = direction_like(PARAMS)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))
    result = jax.jit(fn)(PARAMS, activations(), direction=direction)
    testing.assert_dots_close(result.dots, one_by_one(losses, PARAMS, activations(), direction))
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


@jax.custom_vjp
def and_doubled(x, w):
    return x * w, 2 * w


and_doubled.defvjp(
    lambda x, w: (and_doubled(x, w), (x, w)),
    lambda kept, g: (g[0] * kept[1], g[0] * kept[0] + 2 * g[1]),
)


def test_outputs_of_no_row_beside_outputs_of_rows():
    """Which JAX 0.10 gives wrong gradients under ``jax.vmap``, and JAX 0.12 none."""

    def loss_fn(params, x):
        first, second = and_doubled(x, params["w"])
        return jnp.sum(first * first) + jnp.sum(second * x)

    params = {"w": jnp.ones(3)}
    fn = value_grad_and_dots(loss_fn, per_example=True)
    message = r"custom_vjp_call at .*and_doubled at .*an output that does not depend on the row"
    with pytest.raises(NotImplementedError, match=message):
        fn(params, jnp.ones((2, 3)), direction=params)


@jax.custom_vjp
def clipped_scale(x, w):
    return x * w[None]


clipped_scale.defvjp(
    lambda x, w: (clipped_scale(x, w), (x, w)),
    lambda kept, g: (g * kept[1][None], jnp.sum(clip(g) * kept[0], axis=0)),
)


@jax.custom_vjp
def centred_gradient(x):
    return 1.0 * x


centred_gradient.defvjp(
    lambda x: (centred_gradient(x), None), lambda _, g: (g - g.mean(0, keepdims=True),)
)


@pytest.mark.parametrize("order", ["reversed", "by_data", "micro_batches", "row_by_row"])
def test_rules_of_moved_rows(order):
    """A rule that is not linear, and one that mixes rows in its backward pass alone."""
    params, x = {"w": draw(FEATURES, seed=4)}, draw(6, FEATURES, seed=1)

    def losses(params, x):
        return mean_squares(jnp.sin(clipped_scale(x, params["w"])))

    def arranged(losses):
        def loss_fn(params, x):
            if order == "reversed":
                return jnp.sum(losses(params, x[::-1]))
            if order == "by_data":
                return jnp.sum(losses(params, x[jnp.argsort(x[:, 0])]))
            parts = x.reshape(3, 2, FEATURES) if order == "micro_batches" else x[:, None]
            return jnp.sum(jax.lax.map(lambda part: losses(params, part), parts))

        return value_grad_and_dots(loss_fn, loss_reduction="sum")

    direction = direction_like(params)
    result = jax.jit(lambda p, x, v: arranged(losses)(p, x, direction=v))(params, x, direction)
    testing.assert_dots_close(result.dots, one_by_one(losses, params, x, direction))
    if order == "row_by_row":
        return

    def mixed(params, x):
        return losses(params, centred_gradient(x * params["w"][None]))

    with pytest.raises(ValueError, match=r"in the backward rule of .*centred_gradient"):
        arranged(mixed)(params, x, direction=params)


@jax.custom_vjp
def sorted_by(x, order):
    return x[order]


sorted_by.defvjp(lambda x, order: (x[order], order), lambda order, g: (g[jnp.argsort(order)], None))


@jax.custom_vjp
def sorted_and_left(x, order):
    return x[order]


sorted_and_left.defvjp(lambda x, order: (x[order], order), lambda order, g: (g, None))


@jax.custom_vjp
def sorted_and_centred(x, order):
    return x[order]


sorted_and_centred.defvjp(
    lambda x, order: (x[order], order),
    lambda order, g: ((g - g.mean(0, keepdims=True))[jnp.argsort(order)], None),
)


def test_rules_that_move_rows_bring_them_back():
    params, x = {"w": draw(FEATURES, 4), "v": draw(4, 3)}, draw(6, FEATURES, seed=1)

    def loss_with(move):
        def loss_fn(params, x):
            order = jnp.argsort(x[:, 0])
            h = move(jnp.tanh(x @ params["w"]), order) @ params["v"]
            return jnp.sum(jnp.square(h))

        return jax.jit(value_grad_and_dots(loss_fn, loss_reduction="sum"))

    def losses(params, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ params["w"]) @ params["v"]), axis=1)

    direction = direction_like(params)
    result = loss_with(sorted_by)(params, x, direction=direction)
    testing.assert_dots_close(result.dots, one_by_one(losses, params, x, direction))
    assert int(result.conflicts) == 0
    left = loss_with(sorted_and_left)(params, x, direction=direction)
    assert int(left.conflicts) > 0
    assert jnp.isnan(left.dots["w"]).all()
    with pytest.raises(ValueError, match=r"sub.*combines rows with a value in which rows are"):
        loss_with(sorted_and_centred)(params, x, direction=direction)
