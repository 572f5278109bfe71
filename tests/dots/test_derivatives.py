"""Derivatives of the dots by direction, parameters and batch, against those of per-row autodiff."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ghostjax import testing, value_grad_and_dots
from ghostjax._late import value_and_dots_fn
from ghostjax.core import routes
from models.arrays import FEATURES, ROWS, activations, direction_like, draw, mean_squares
from models.layers import fused_norm

PARAMS = {
    "layers": draw(2, FEATURES, FEATURES) / 2,
    "gain": 1 + draw(1, 1, FEATURES, seed=2) / 4,
    "bias": draw(1, 1, FEATURES, seed=3),
}
X = activations()
DIRECTION = direction_like(PARAMS)
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.cos(leaf), leaf**2]), DIRECTION)
WEIGHTS = {1: draw(ROWS, seed=7), 3: draw(3, ROWS, seed=8)}


def block(params, x, w):
    return jnp.tanh((x @ w) * params["gain"] + params["bias"])


def unrolled(params, x):
    for w in params["layers"]:
        x = block(params, x, w)
    return mean_squares(x @ params["layers"][0].T)


def looped(params, x, make=lambda layer: layer):
    layer = make(functools.partial(block, params))
    return mean_squares(jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])[0])


def own_rule(params, x):
    x = fused_norm(x @ params["layers"][0], params["gain"].ravel(), params["bias"].ravel())
    return mean_squares(jnp.sin(x) @ params["layers"][1])


LOSSES = {
    "unrolled": unrolled,
    "scan": looped,
    "scan_remat": functools.partial(looped, make=jax.checkpoint),
    "custom_vjp": own_rule,
}


def eager(loss, **settings):
    fn = value_grad_and_dots(loss, **settings)
    return lambda p, x, v: fn(p, x, direction=v).dots


def late(loss, **settings):
    return lambda p, x, v: value_and_dots_fn(loss, **settings)(p, x)[2](v)


def per_example(make):
    def made(loss):
        return make(lambda p, row: loss(p, row[None]), per_example=True)

    return made


FORMS = {
    "eager": eager,
    "late": late,
    "late_remat": functools.partial(late, remat=True),
    "per_example": per_example(eager),
    "per_example_late": per_example(late),
}
ROUTES = ("tangent", "rows")


def take(route, monkeypatch):
    monkeypatch.setattr(routes, "rows_cost_less", lambda *_, **__: route == "rows")


def expected_derivatives(losses, count):
    """Of sum_ki w_ki < d l_i / d p, v_k >, by parameters, batch and directions."""

    def one(params, x, direction, weights):
        def loss(params):
            return jnp.sum(weights * losses(params, x))

        products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)
        return sum(jax.tree.leaves(products))

    def total(params, x, direction):
        if count == 1:
            return one(params, x, direction, WEIGHTS[1])
        return jnp.sum(jax.vmap(one, (None, None, 0, 0))(params, x, direction, WEIGHTS[count]))

    return jax.jit(jax.grad(total, (0, 1, 2)))


def derivatives(dots, count, differentiate):
    def total(params, x, direction):
        return jnp.sum(WEIGHTS[count] * sum(jax.tree.leaves(dots(params, x, direction))))

    return jax.jit(differentiate(total, (0, 1, 2)))


QUICK = {
    ("unrolled", "late", "tangent", 1),
    ("unrolled", "eager", "rows", 3),
    ("scan_remat", "eager", "rows", 1),
    ("scan_remat", "late", "tangent", 3),
    ("custom_vjp", "per_example_late", "tangent", 1),
    ("custom_vjp", "late", "rows", 3),
}
# Every loss in every form by every route, with one direction or with several.
CASES = [
    (name, form, route, count)
    for i, name in enumerate(LOSSES)
    for j, form in enumerate(FORMS)
    for k, route in enumerate(ROUTES)
    for count in (1, 3)
    if (count == 1) == ((i + j + k) % 2 == 0) or (name, form, route, count) in QUICK
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "route", "count"), CASES)
def test_derivatives_of_the_dots(name, form, route, count, monkeypatch):
    """By the direction, the weighted sum of rows' gradients; by parameters, sum_i w_i H_i v."""
    take(route, monkeypatch)
    direction = DIRECTION if count == 1 else STACKED
    losses = LOSSES[name]
    dots = FORMS[form](lambda params, x: jnp.mean(losses(params, x)))
    found = derivatives(dots, count, jax.grad)(PARAMS, X, direction)
    expected = expected_derivatives(losses, count)(PARAMS, X, direction)
    testing.assert_dots_close(found, expected)


@pytest.mark.parametrize(
    ("form", "route"), [("eager", "rows"), ("late", "tangent"), ("per_example", "tangent")]
)
def test_forward_mode(form, route, monkeypatch):
    take(route, monkeypatch)
    dots = FORMS[form](lambda params, x: jnp.mean(unrolled(params, x)))
    at, along = (PARAMS, X, DIRECTION), (DIRECTION, jnp.cos(X), PARAMS)

    def moved(params, x, direction):
        def of_rows(step):
            return unrolled(jax.tree.map(lambda p, v: p + step * v, params, direction), x)

        return jax.jvp(of_rows, (jnp.float32(0),), (jnp.float32(1),))[1]

    def total(*args):
        return sum(jax.tree.leaves(dots(*args)))

    found, expected = (jax.jit(lambda f=f: jax.jvp(f, at, along)[1])() for f in (total, moved))
    testing.assert_dots_close(found, expected)


@pytest.mark.parametrize("route", ROUTES)
def test_derivatives_of_value_and_gradient(route, monkeypatch):
    """The gradient that comes out beside the dots has the Hessian of the loss."""
    take(route, monkeypatch)

    def loss_fn(params, x):
        return jnp.mean(looped(params, x))

    fn = value_grad_and_dots(loss_fn)

    def with_dots(params):
        result = fn(params, X, direction=DIRECTION)
        return result.value, result.grads

    def plain(params):
        return jax.value_and_grad(loss_fn)(params, X)

    def derivative(function):
        def total(params):
            value, grads = function(params)
            return value + sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, DIRECTION)))

        return jax.jit(jax.grad(total))(PARAMS)

    testing.assert_dots_close(derivative(with_dots), derivative(plain))
