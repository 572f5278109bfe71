"""The routes that explain tells are those that run."""

import sys

import jax
import jax.numpy as jnp
import pytest

from ghostjax import explain, value_grad_and_dots
from ghostjax._jaxprs import inner_jaxprs
from ghostjax._late import value_and_dots_fn
from ghostjax.core import Route
from ghostjax.core.row_loop import row_loop
from models.arrays import draw


def wide_layer(positions, directions):
    def loss_fn(params, x):
        return jnp.mean(jnp.square(x @ params["w"] + params["b"][None, None]))

    params = {"b": draw(256), "w": draw(256, 256)}
    x = jax.ShapeDtypeStruct((8, positions, 256), jnp.float32)
    return loss_fn, params, x, explain(loss_fn, directions=directions)(params, x)


def routes(explanation):
    return [(use.route, use.late_route) for use in explanation.uses]


def test_routes_by_shape():
    *_, one = wide_layer(128, None)
    *_, many = wide_layer(128, 6)
    *_, short = wide_layer(2, 6)
    assert routes(one) == [("tangent", "features"), ("tangent", "tangent")]
    assert routes(many) == [("features",) * 2, ("rows",) * 2]
    assert routes(short) == [("features",) * 2, ("tangent",) * 2]
    assert {type(use.route) for use in many.uses} == {Route}
    # K directions by rows: a product with each row's part of the gradient, and no other.
    matrix, product = 256 * 256, 2 * 8 * 128 * 256 * 256
    assert many.uses[1].flops == 8 * matrix * (1 + 2 * 6)
    # The gradient is there already: its sum over rows is not made again, but the products are.
    assert many.uses[1].late_flops == 8 * matrix * 2 * 6 + product
    assert many.cost < 1.05 < 1.49 < one.cost < 1.51  # no gradient goes to x


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("positions", [2, 128])
def test_routes_are_those_that_run(positions, late, monkeypatch):
    """Loops over rows stand for the rows route; nothing else here makes any."""
    monkeypatch.setattr(sys.modules[row_loop.__module__], "AT_ONCE", 0)
    loss_fn, params, x, explanation = wide_layer(positions, 6)
    direction = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), params)

    def dots(params, x, direction):
        if late:
            return value_and_dots_fn(loss_fn)(params, x)[2](direction)
        return value_grad_and_dots(loss_fn)(params, x, direction=direction).dots

    def loops(jaxpr):
        return sum(
            (eqn.primitive.name == "scan") + sum(loops(inner) for inner, _ in inner_jaxprs(eqn))
            for eqn in jaxpr.eqns
        )

    expected = [found[late] for found in routes(explanation)].count(Route.ROWS)
    found = loops(jax.make_jaxpr(dots)(params, x, direction).jaxpr)
    assert found == expected == (positions == 128)
