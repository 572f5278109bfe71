"""The rows route, taken everywhere: layouts of a product, dtypes, inside transformations."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from ghostjax.core import routes
from ghostjax.core.row_loop import row_loop
from models.arrays import K, directions_like, draw, mean_squares
from tests.dots.checks import expected_stacked
from tests.variants import some_quick


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Every product goes row by row, in a loop; the list has their sizes."""
    found = []
    monkeypatch.setattr(sys.modules[row_loop.__module__], "AT_ONCE", 0)

    def always(sizes, directions, *, gradient):
        found.append((sizes, directions, gradient))
        return True

    monkeypatch.setattr(routes, "rows_cost_less", always)
    return found


def dot(x, w, inputs, contracted):
    return jax.lax.dot_general(x, w, ((inputs, contracted), ((), ())))


def merged(x):
    return x.reshape(-1, x.shape[-1])


def time_first(x):
    return jnp.swapaxes(x, 0, 1)


# By name, the shape of the batch, that of the parameter, and the product, rows first.
LAYOUTS = {
    "x_w": ((6, 6, 5), (5, 4), lambda x, w: x @ w),
    "w_x": ((6, 6, 5), (5, 4), lambda x, w: jnp.moveaxis(dot(w, x, (0,), (2,)), 0, -1)),
    "transposed": ((6, 6, 5), (4, 5), lambda x, w: dot(x, w, (2,), (1,))),
    "transposed_w_x": ((6, 6, 5), (4, 5), lambda x, w: jnp.moveaxis(dot(w, x, (1,), (2,)), 0, 2)),
    "one_position": ((6, 5), (5, 4), lambda x, w: x @ w),
    "one_row": ((1, 6, 5), (5, 4), lambda x, w: x @ w),
    "one_output": ((6, 6, 5), (5,), lambda x, w: x @ w),
    "one_output_w_x": ((6, 5, 6), (5,), lambda x, w: dot(w, x, (0,), (1,))),
    "no_inputs": ((6, 6), (5, 4), lambda x, w: dot(x, w, (), ())),
    "no_inputs_w_x": ((6, 6), (5, 4), lambda x, w: jnp.moveaxis(dot(w, x, (), ()), 2, 0)),
    "heads": ((6, 3, 5), (5, 2, 4), lambda x, w: jnp.einsum("btd,dhk->bthk", x, w)),
    "out_of_heads": ((6, 3, 2, 4), (2, 4, 5), lambda x, w: jnp.einsum("bthk,hkd->btd", x, w)),
    "swapped_inputs": ((6, 4, 3, 2), (2, 5, 4), lambda x, w: dot(x, w, (1, 3), (2, 0))),
    "apart": ((6, 4, 3, 2), (4, 5, 2, 3), lambda x, w: dot(x, w, (3, 1), (2, 0))),
    "inputs_last_w_x": (
        (6, 4, 3),
        (5, 2, 3, 4),
        lambda x, w: jnp.moveaxis(dot(w, x, (3, 2), (1, 2)), 2, 0),
    ),
    "inputs_first": ((6, 5, 6), (5, 4), lambda x, w: dot(x, w, (1,), (0,))),
    "rows_last": ((6, 5, 6), (5, 4), lambda x, w: jnp.swapaxes(dot(x.T, w, (1,), (0,)), 0, 1)),
    "several_positions": ((6, 2, 3, 5), (5, 4), lambda x, w: x @ w),
    "merged": ((6, 6, 5), (5, 4), lambda x, w: (merged(x) @ w).reshape(6, 6, 4)),
    "merged_time_first": (
        (6, 6, 5),
        (5, 4),
        lambda x, w: time_first((merged(time_first(x)) @ w).reshape(6, 6, 4)),
    ),
    "merged_between": (
        (4, 6, 5),
        (5, 3),
        lambda x, w: (
            (jnp.moveaxis(x.reshape(4, 2, 3, 5), 1, 0).reshape(2 * 4 * 3, 5) @ w)
            .reshape(2, 4, 3, 3)
            .transpose(1, 0, 2, 3)
        ),
    ),
    "merged_w_x": (
        (6, 6, 5),
        (4, 5),
        lambda x, w: jnp.moveaxis(dot(w, merged(x), (1,), (1,)).reshape(4, 6, 6), 0, 2),
    ),
    "time_first": ((6, 6, 5), (5, 4), lambda x, w: time_first(time_first(x) @ w)),
    "look_up_of_ones": (
        (6, 6, 5),
        (5, 4),
        lambda x, w: jax.nn.one_hot(jnp.argmax(x, -1), 5) @ w * jnp.sum(x, -1, keepdims=True),
    ),
}


def mean_of(losses):
    return lambda params, batch: jnp.mean(losses(params, batch))


def both_forms(loss_fn):
    """``(params, batch, direction) -> (eager, late)``"""

    def run(params, batch, direction):
        eager = value_grad_and_dots(loss_fn)(params, batch, direction=direction)
        return eager, value_and_dots_fn(loss_fn)(params, batch)[2].result(direction)

    return run


def check(found, losses, params, batch, directions):
    """Dots and gradient of a GradDots of stacked directions."""
    testing.assert_dots_close(found.dots, expected_stacked(losses, params, batch, directions))
    grads = jax.jit(jax.grad(mean_of(losses)))(params, batch)
    testing.assert_dots_close(found.grads, grads, rtol=1e-6)


# The others differ less from these.
SLOW = {
    "x_w", "transposed_w_x", "one_output", "one_output_w_x", "no_inputs_w_x", "out_of_heads",
    "swapped_inputs", "inputs_first", "several_positions", "merged", "time_first",
    "look_up_of_ones",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    some_quick(LAYOUTS, lambda name: name not in SLOW),
)
def test_every_layout(name, taken):
    """On data that is made of a parameter itself, so that its gradient passes, too."""
    shape, param, product = LAYOUTS[name]
    x = draw(*shape, seed=1)
    params = {"w": draw(*param), "gain": jnp.float32(1.3)}

    def losses(params, x):
        return mean_squares(jnp.tanh(product(jnp.sin(params["gain"] * x), params["w"])))

    fn, directions = jax.jit(value_grad_and_dots(mean_of(losses))), directions_like(params)
    check(fn(params, x, direction=directions), losses, params, x, directions)
    assert [(sizes.b, directions) for sizes, directions, _ in taken] == [(shape[0], K)]


def network(params, x):
    """A tied matrix in a loop, one that is made of two parameters, and a term of no row."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jnp.sin(x @ (params["a"] @ params["b"])) @ params["layers"][0].T


NETWORK = {
    "layers": draw(2, 5, 5) / 2,
    "a": draw(5, 2, seed=2),
    "b": draw(2, 5, seed=3),
}
X = draw(6, 6, 5, seed=1)


def network_losses(params, x):
    return mean_squares(network(params, x))


@pytest.mark.slow
def test_loops_checkpoints_and_products_of_parameters(taken):
    directions = directions_like(NETWORK)
    for result in jax.jit(both_forms(mean_of(network_losses)))(NETWORK, X, directions):
        check(result, network_losses, NETWORK, X, directions)
    assert {(count, gradient) for _, count, gradient in taken} == {
        (K, True), (2 * K, True), (K, False), (2 * K, False)
    }  # fmt: skip


def test_a_product_without_rows_is_dotted_as_a_whole():
    params, fixed = {"w": draw(5, 4)}, draw(3, 5, seed=4)

    def loss_fn(params, x):
        decay = jnp.sum(jnp.square(fixed @ params["w"]))
        return jnp.mean(mean_squares(x @ params["w"])) + decay

    directions = directions_like(params)
    for result in jax.jit(both_forms(loss_fn))(params, X, directions):
        assert result.shared["w"].shape == (K,)
        assert conservation_error(result, directions)["w"].max() <= 1e-5


def rows_alone(a, c, directions):
    """What ``row_loop`` should give, in float64."""
    a, c, directions = (np.asarray(array, np.float64) for array in (a, c, directions))
    parts = np.einsum("bti,bto->bio", a, c)
    return parts.sum(axis=0), np.einsum("bio,kio->kb", parts, directions)


@pytest.mark.parametrize("at_once", [0, 4 * 5 * 3], ids=["loop", "at_once"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")],
)
def test_sums_of_narrow_products_are_float32(first, second, at_once, monkeypatch):
    monkeypatch.setattr(sys.modules[row_loop.__module__], "AT_ONCE", at_once)
    operands = draw(4, 6, 5).astype(first), draw(4, 6, 3, seed=1).astype(second)
    directions = draw(2, 5, 3, seed=2).astype(first)
    run = jax.jit(functools.partial(row_loop, None))
    assert ("while" in run.lower(*operands, directions).as_text()) == (not at_once)
    found = run(*operands, directions)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}
    testing.assert_dots_close(found, rows_alone(*operands, directions), rtol=1e-6)


def dense_losses(params, x):
    return mean_squares(jnp.tanh(x @ params["w"]))


DENSE = {"w": draw(5, 4)}


def test_float64():
    with jax.enable_x64(True):
        params, x = {"w": np.float64(DENSE["w"])}, np.float64(X)
        directions = directions_like(params)
        for result in jax.jit(both_forms(mean_of(dense_losses)))(params, x, directions):
            assert result.dots["w"].dtype == jnp.float64
            expected = expected_stacked(dense_losses, params, x, directions)
            testing.assert_dots_close(result.dots, expected, rtol=1e-12)


def test_vmap_over_directions_and_parameters():
    """Both at once: the loop is made for each of them in turn."""
    directions = directions_like(DENSE)
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), DENSE)
    run = jax.vmap(both_forms(mean_of(dense_losses)), (None, None, 0))
    results = jax.jit(jax.vmap(run, (0, None, None)))(ensemble, X, directions)
    for member in range(2):
        params = {"w": ensemble["w"][member]}
        expected = expected_stacked(dense_losses, params, X, directions)
        for result in results:
            testing.assert_dots_close({"w": result.dots["w"][member]}, expected)


def test_the_precision_that_was_asked_for():
    fn = value_grad_and_dots(mean_of(dense_losses))

    def products():
        jaxpr = str(jax.make_jaxpr(lambda v: fn(DENSE, X, direction=v))(directions_like(DENSE)))
        return jaxpr.count("= dot_general["), jaxpr.count("precision=(Precision.HIGHEST")

    every, highest = products()
    # The forward product and that of the loop; the sums with directions are always float32.
    assert (every >= 3, highest) == (True, 1)
    with jax.default_matmul_precision("highest"):
        every, highest = products()
    assert every == highest


def test_the_older_partitioner_gets_tangents(taken):
    newer = jax.config.jax_use_shardy_partitioner
    fn = value_grad_and_dots(mean_of(dense_losses))
    try:
        jax.config.update("jax_use_shardy_partitioner", False)
        jax.eval_shape(lambda v: fn(DENSE, X, direction=v), directions_like(DENSE))
    finally:
        jax.config.update("jax_use_shardy_partitioner", newer)
    assert not taken


def test_products_with_accumulators_of_their_own_take_tangents(taken):
    """A DotAlgorithm says what sums are made in, and need not allow float32."""
    params, algorithm = DENSE, jax.lax.DotAlgorithmPreset.F32_F32_F32

    def losses(params, x):
        return mean_squares(jnp.matmul(x, params["w"], precision=algorithm))

    directions = directions_like(params)
    fn = jax.jit(value_grad_and_dots(mean_of(losses)))
    check(fn(params, X, direction=directions), losses, params, X, directions)
    assert not taken
