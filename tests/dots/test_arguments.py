"""Further arguments of the loss: arrays are traced, and the rest stays as it is."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ghostjax import GradDotProdEngine, explain, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import FEATURES, direction_like, mean_squares
from tests.dots.checks import DENSE, X, dense, expected_dots


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: Any = jnp.bfloat16
    shape: tuple[int, ...] = ()


@pytest.mark.parametrize("jitted", [False, True], ids=["plain", "jitted"])
def test_settings_that_have_a_dtype(jitted):
    """They are static; arrays beside them, of NumPy too, are arguments."""

    def loss_fn(params, x, settings, scales, *, like):
        assert isinstance(settings, Settings)
        assert isinstance(like, jax.ShapeDtypeStruct)
        assert all(isinstance(scale, jax.core.Tracer) for scale in scales)
        losses = mean_squares(dense(params, x)) * scales[0][0] * scales[1]
        return jnp.mean(losses.astype(settings.dtype).astype(like.dtype))

    scales = np.full(2, 3, np.float32), np.float32(0.5)
    like = jax.ShapeDtypeStruct((), jnp.float32)
    fn = value_grad_and_dots(loss_fn)
    if jitted:
        fn = jax.jit(fn, static_argnums=2, static_argnames="like")
    direction = direction_like(DENSE)
    result = fn(DENSE, X, Settings(jnp.float32), scales, like=like, direction=direction)
    expected = expected_dots(
        lambda params, x: 1.5 * mean_squares(dense(params, x)), DENSE, X, direction
    )
    testing.assert_dots_close(result.dots, expected)


# A module in the place of the parameters.


def direction_of(grads):
    """With another value everywhere than the gradient."""
    return jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), grads)


class WithTable(eqx.Module):
    """Beside floating-point arrays: functions, a rate, and a table of numbers."""

    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    table: jax.Array

    def __call__(self, x):
        return self.dropout(self.mlp(x[self.table]))


@pytest.mark.slow
def test_an_equinox_module():
    """As ``eqx.filter_grad`` has it."""
    net = eqx.nn.MLP(FEATURES, 3, 4, 1, key=jax.random.key(0))
    net = WithTable(net, eqx.nn.Dropout(0.0), jnp.arange(FEATURES)[::-1])

    def loss_fn(net, x):
        return jnp.mean(jnp.square(jax.vmap(net)(x)))

    direction = direction_of(eqx.filter_jit(eqx.filter_grad(loss_fn))(net, X))
    early, late = value_grad_and_dots(loss_fn), value_and_dots_fn(loss_fn)

    @eqx.filter_jit
    def run(net, x):
        return early(net, x, direction=direction), late(net, x)

    one, (value, grads, dots) = run(net, X)
    expected = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(net, X)
    testing.assert_dots_close((one.value, one.grads), expected, rtol=1e-6)
    testing.assert_dots_close((value, grads), expected, rtol=1e-6)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    of_rows = expected_dots(
        jax.vmap(lambda params, x: loss_fn(eqx.combine(params, static), x[None]), (None, 0)),
        params,
        X,
        direction,
    )
    testing.assert_dots_close(one.dots, of_rows)
    testing.assert_dots_close(dots(direction), of_rows)
    assert one.dots.table is None
    names = {use.parameter for use in explain(loss_fn)(net, X).uses}
    assert names == {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)}


def nnx_net(*layers):
    return nnx.Sequential(
        nnx.Linear(FEATURES, 4, rngs=nnx.Rngs(0)), *layers, nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    )


def squares(net, x):
    return jnp.mean(jnp.square(net(x)))


def test_an_nnx_module():
    """As ``nnx.grad`` has it: other variables are no parameters."""
    net = nnx_net(nnx.gelu, nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    direction = direction_of(nnx.jit(nnx.grad(squares))(net, X))

    @jax.jit
    def run(params, x):
        net = nnx.merge(graphdef, params, rest)
        early = value_grad_and_dots(squares)(net, x, direction=direction)
        return early, value_and_dots_fn(squares)(net, x)

    one, (value, grads, dots) = run(params, X)
    expected = nnx.jit(nnx.value_and_grad(squares))(net, X)
    testing.assert_dots_close((one.value, one.grads), expected, rtol=1e-6)
    testing.assert_dots_close((value, grads), expected, rtol=1e-6)
    of_rows = expected_dots(
        jax.vmap(
            lambda params, x: squares(nnx.merge(graphdef, params, rest, copy=True), x[None]),
            (None, 0),
        ),
        params,
        X,
        direction,
    )
    testing.assert_dots_close(one.dots, of_rows)
    testing.assert_dots_close(dots(direction), of_rows)


@pytest.mark.parametrize(
    "layer",
    [nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))],
    ids=["counts", "averages"],
)
def test_an_nnx_module_whose_state_the_loss_changes(layer):
    net = nnx_net(layer)
    expected = (
        r"changes state(.|\n)*layers(.|\n)*nnx.split\(model, nnx.Param, ...\)(.|\n)*nnx.merge"
    )
    with pytest.raises(TypeError, match=expected):
        value_grad_and_dots(squares)(net, X, direction=None)
    split = nnx.split(net, nnx.Param, ...)
    assert jax.tree.structure(split) == jax.tree.structure(nnx.split(net, nnx.Param, ...))


def test_modules_that_are_not_split():
    """Inside other trees, and as pure state: the two lines are named."""
    layer = eqx.nn.MLP(FEATURES, 3, 4, 1, key=jax.random.key(0))
    state = nnx.state(nnx_net(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    equinox_lines = r"activation: custom_jvp(.|\n)*eqx.partition\(model.*\n.*eqx.combine"
    for params, expected in (
        ({"net": layer}, equinox_lines),
        (state, r"key<fry>(.|\n)*nnx.split\(model, nnx.Param.*\n.*nnx.merge"),
        ({"f": jnp.tanh}, r"\['f'\]: PjitFunction(.|\n)*close over it.$"),
    ):
        with pytest.raises(TypeError, match=expected):
            value_grad_and_dots(squares)(params, X, direction=params)
    with pytest.raises(TypeError, match=equinox_lines):
        GradDotProdEngine(squares, val_batch_size=2)(layer, X)
