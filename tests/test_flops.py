"""FLOPs of jaxprs: by hand for single operations, and beside XLA's figures for whole steps."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax._flops import flops, flops_after, rounds_unknown
from models.arrays import draw


def count(function, *args):
    return flops(jax.make_jaxpr(function)(*args).jaxpr)


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def convolution(*, padding="VALID", **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    kwargs = {"window_strides": (1, 1), "dimension_numbers": numbers, **kwargs}
    return lambda x, w: jax.lax.conv_general_dilated(x, w, padding=padding, **kwargs)


ONES = {
    "product": (lambda a, b: a @ b, (zeros(2, 3), zeros(3, 5)), 2 * 2 * 3 * 5),
    "batched product": (
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        (zeros(7, 2, 3), zeros(7, 3, 5)),
        2 * 7 * 2 * 3 * 5,
    ),
    "grouped product": (
        jax.lax.ragged_dot,
        (zeros(8, 3), zeros(2, 3, 5), zeros(2, dtype=jnp.int32)),
        2 * 8 * 3 * 5,
    ),
    "elementwise": (lambda x: jnp.tanh(x) + 1, (zeros(4, 3),), 24),
    "sum": (lambda x: jnp.sum(x, axis=0), (zeros(4, 3),), 12),
    "largest": (lambda x: jnp.argmax(x, axis=0), (zeros(4, 3),), 12),
    "moved": (lambda x: x.T.reshape(2, 6)[:, ::-1], (zeros(4, 3),), 0),
    "convolution": (convolution(), (zeros(2, 6, 6, 3), zeros(3, 3, 3, 4)), 2 * 2 * 16 * 27 * 4),
    "convolution with padding": (
        convolution(padding="SAME"),
        (zeros(2, 6, 6, 3), zeros(3, 3, 3, 4)),
        2 * 2 * 3 * 4 * (3 * 6 - 2) ** 2,
    ),
    "convolution with strides": (
        convolution(window_strides=(3, 2)),
        (zeros(2, 6, 6, 3), zeros(3, 3, 3, 4)),
        2 * 2 * 27 * 4 * 2 * 2,
    ),
    "convolution in groups": (
        convolution(feature_group_count=3),
        (zeros(2, 6, 6, 3), zeros(3, 3, 1, 6)),
        2 * 2 * 16 * 9 * 6,
    ),
    "transposed convolution": (
        convolution(padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),
        (zeros(1, 4, 4, 1), zeros(3, 3, 1, 1)),
        2 * (3 * 4) ** 2,  # each input meets the whole window, and each hole none of it
    ),
    "dilated convolution": (
        convolution(rhs_dilation=(2, 2)),
        (zeros(1, 6, 6, 1), zeros(3, 3, 1, 1)),
        2 * 4 * 9,
    ),
    "loop": (
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), c * 2), x, None, length=5),
        (zeros(4),),
        5 * 8,
    ),
    "what a loop gives and nothing needs": (
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), c * 2), x, None, length=5)[0],
        (zeros(4),),
        5 * 4,
    ),
    "what only the next round of a carry needs": (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, c: (c[0] * c[1], c[1] + c[2], *c[2:]), x)[0],
        (tuple(zeros(4) for _ in range(4)),),
        3 * (4 + 4),
    ),
    "carries that nothing needs": (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, c: (jnp.sin(c[0]), c[0] * c[1]), (x, x))[0],
        (zeros(4),),
        3 * 4,  # as XLA, which takes them out of its while loops
    ),
    "loop in a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, c: jax.lax.map(jnp.sin, c), x),
        (zeros(4, 2),),
        3 * 8,  # and no counter, which nothing needs
    ),
    "largest branch": (
        lambda x: jax.lax.switch(0, [jnp.sin, lambda x: x * 2 + 1, lambda x: x], x),
        (zeros(4),),
        8 + 1,  # and the number of the branch, clamped
    ),
    "what nothing needs": (lambda x: (jnp.sin(x), x.T)[1], (zeros(4, 3),), 0),
    "what nothing needs of a call": (
        lambda x: jax.jit(lambda x: (jnp.sin(x), x * 2))(x)[1],
        (zeros(4, 3),),
        12,
    ),
    "scattered": (lambda x, y: x.at[:2].add(y), (zeros(9, 3), zeros(2, 3)), 6),
    "windows": (
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (3,), (1,), "VALID"),
        (zeros(6),),
        12,
    ),
    "linear solver": (
        lambda a, b: jax.lax.custom_linear_solve(
            lambda x: a @ x, b, lambda _, b: b * 2, lambda _, b: b * 2
        ),
        (zeros(4, 4), zeros(4)),
        4,
    ),
}


@pytest.mark.parametrize("name", ONES)
def test_by_hand(name):
    function, args, expected = ONES[name]
    assert count(function, *args) == expected


def test_gradient_of_grouped_products():
    def loss(w, x, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes))

    args = zeros(2, 30, 50), zeros(80, 30), zeros(2, dtype=jnp.int32)
    product = 2 * 80 * 30 * 50
    assert product <= count(jax.grad(loss), *args) <= 1.1 * product


def test_a_while_loop_counts_once_and_is_named():
    def function(x):
        x = jax.lax.while_loop(lambda x: x[0] < 1, jnp.sin, x)
        return jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0] < 1, jnp.sin, x))(x)

    jaxpr = jax.make_jaxpr(function)(zeros(4)).jaxpr
    assert [eqn.primitive.name for eqn in rounds_unknown(jaxpr)] == ["while", "while"]
    assert flops(jaxpr) == 2 * (4 + 1)


def test_what_depends_on_some_inputs():
    def function(x, y):
        return x * 2 * y, jnp.sin(y)

    jaxpr = jax.make_jaxpr(function)(zeros(4), zeros(4)).jaxpr
    assert [flops_after(jaxpr, jaxpr.invars[k : k + 1]) for k in range(2)] == [8, 8]


def dense(params, x):
    for w, b in params:
        x = jnp.tanh(x @ w + b[None])
    return jnp.mean(jnp.square(x))


def images(params, x):
    x = jax.nn.relu(convolution(padding="SAME", window_strides=(2, 2))(x, params[0]))
    x = jax.nn.relu(convolution(padding="SAME", feature_group_count=4)(x, params[1]))
    return jnp.mean(jnp.square(convolution(rhs_dilation=(2, 2))(x, params[2])))


STEPS = {
    "dense": (dense, ([(draw(256, 256), draw(256))] * 3, draw(64, 256))),
    "convolutions": (
        images,
        ([draw(3, 3, 16, 32), draw(5, 5, 8, 64), draw(3, 3, 64, 32)], draw(4, 24, 24, 16)),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_beside_xla(name):
    loss, args = STEPS[name]
    step = jax.value_and_grad(loss)
    found = jax.jit(step).lower(*args).compile().cost_analysis()["flops"]
    assert count(step, *args) == pytest.approx(found, rel=0.03)
