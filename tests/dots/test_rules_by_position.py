"""Derivative rules with parameters, where examples are told apart along two axes."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from tests.dots.checks import direction_like, draw

B, T, F = 3, 4, 5
PARAMS = {"w": draw(F, F), "s": draw(F, seed=4)}
X = draw(B, T, F, seed=1)
PLACES = jnp.arange(B * T).reshape(B, T)


@jax.custom_vjp
def product(x, w):
    return x @ w


def _product_backward(kept, g):
    x, w = kept
    return g @ w.T, x.reshape(-1, F).T @ g.reshape(-1, F)


product.defvjp(lambda x, w: (x @ w, (x, w)), _product_backward)


@jax.custom_vjp
def clipped_scale(x, s):
    return x * s[None, None]


clipped_scale.defvjp(
    lambda x, s: (clipped_scale(x, s), (x, s)),
    lambda kept, g: (
        g * kept[1][None, None],
        jnp.sum(jnp.clip(g, -0.2, 0.2) * kept[0], axis=(0, 1)),
    ),
)


@jax.custom_vjp
def scale_in_two_steps(x, s):
    return x * jnp.expand_dims(s, range(x.ndim - 1))


def _two_steps_backward(kept, g):
    x, s = kept
    summed = g * x
    while summed.ndim > 1:
        summed = jnp.sum(summed, axis=0)
    return g * jnp.expand_dims(s, range(x.ndim - 1)), summed


scale_in_two_steps.defvjp(lambda x, s: (scale_in_two_steps(x, s), (x, s)), _two_steps_backward)


def loss_fn(params, x):
    return jnp.sum(jnp.square(jnp.sin(clipped_scale(product(x, params["w"]), params["s"]))))


def expected(direction):
    """By place, what the rules give for its cotangents."""
    h = X @ PARAMS["w"]
    _, back = jax.vjp(lambda y: jnp.sum(jnp.square(jnp.sin(y))), h * PARAMS["s"][None, None])
    (g,) = back(1.0)
    return {
        "w": jnp.einsum("bti,bto,io->bt", X, g * PARAMS["s"][None, None], direction["w"]).ravel(),
        "s": jnp.einsum("bto,o->bt", jnp.clip(g, -0.2, 0.2) * h, direction["s"]).ravel(),
    }


@pytest.mark.parametrize("arrangement", ["in_place", "positions_first", "sorted_by_data"])
def test_rules_by_position(arrangement):
    def arranged(params, x):
        if arrangement == "positions_first":
            x = x.swapaxes(0, 1)
        elif arrangement == "sorted_by_data":
            x = x[jnp.argsort(x[:, 0, 0])]
        return loss_fn(params, x)

    direction = direction_like(PARAMS)
    labels = {"labels": PLACES, "num_labels": B * T}

    @jax.jit
    def run(params, x, v):
        early = value_grad_and_dots(arranged, loss_reduction="sum")
        late = value_and_dots_fn(arranged, loss_reduction="sum")
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v)
        several = late(params, x, **labels)[2].result(stacked)
        return early(params, x, direction=v, **labels), several

    result, several = run(PARAMS, X, direction)
    wanted = expected(direction)
    testing.assert_dots_close(result.dots, wanted)
    doubled = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), wanted)
    testing.assert_dots_close(several.dots, doubled)
    assert (int(result.conflicts), int(several.conflicts)) == (0, 0)


def test_rules_that_sum_step_by_step_are_refused():
    """And the way out is one."""

    def stepwise(params, x):
        return jnp.sum(jnp.square(jnp.sin(scale_in_two_steps(x, params["s"]))))

    params = {"s": PARAMS["s"]}
    direction = direction_like(params)
    labels = {"labels": PLACES, "num_labels": B * T}
    fn = value_grad_and_dots(stepwise, loss_reduction="sum")
    message = r"\['s'\] meets data in custom_vjp_call at .*along several axes. Let them lie along"
    with pytest.raises(ValueError, match=message):
        fn(params, X, direction=direction, **labels)

    flat = value_grad_and_dots(
        lambda params, x: stepwise(params, x.reshape(-1, F)), loss_reduction="sum"
    )
    result = flat(params, X, direction=direction, **labels)
    slopes = jnp.sin(2 * X * params["s"][None, None]) * X
    testing.assert_dots_close(
        result.dots["s"], jnp.einsum("bto,o->bt", slopes, direction["s"]).ravel()
    )
