"""value_grad_and_dots inside other transformations, and its arguments."""

import chex
import jax
import jax.numpy as jnp

from ghostjax import testing, value_grad_and_dots
from tests.dots.checks import (
    DENSE,
    FEATURES,
    X,
    dense,
    direction_like,
    draw,
    expected_dots,
    mean_squares,
)


def test_stacked_directions():
    """vmap over directions repeats the tangent products, not the forward and backward pass."""
    width = 64
    params = {"w1": draw(width, width), "w2": draw(width, width)}
    x = draw(256, width)

    def loss_fn(params, x):
        return jnp.mean(mean_squares(jnp.tanh(x @ params["w1"]) @ params["w2"]))

    fn = value_grad_and_dots(loss_fn)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf, leaf**2]), params)

    def many(params, x, directions):
        run = jax.vmap(lambda v: fn(params, x, direction=v).dots)
        return run(directions)

    dots = jax.jit(many)(params, x, stacked)
    single = fn(params, x, direction=params).dots
    testing.assert_dots_close(jax.tree.map(lambda leaf: leaf[0], dots), single)
    testing.assert_dots_close(
        jax.tree.map(lambda leaf: leaf[1], dots), jax.tree.map(lambda leaf: 2 * leaf, single)
    )

    def flops(count):
        some = jax.tree.map(lambda leaf: leaf[:count], stacked)
        return jax.jit(many).lower(params, x, some).compile().cost_analysis()["flops"]

    product = 2 * 2 * 256 * width * width
    assert flops(4) - flops(1) <= 1.05 * 3 * product


def test_in_a_scan_over_microbatches():
    direction = direction_like(DENSE)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))

    @jax.jit
    def run(batches):
        def step(total, x):
            result = fn(DENSE, x, direction=direction)
            return jax.tree.map(jnp.add, total, result.grads), result.dots

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, DENSE), batches)

    _, dots = run(X.reshape(2, 3, FEATURES))
    joined = jax.tree.map(lambda leaf: leaf.reshape(-1), dots)
    testing.assert_dots_close(joined, fn(DENSE, X, direction=direction).dots)


def test_arguments_in_any_place_and_aux():
    def loss_fn(scale, x, key, params, *, shift, name="unused"):
        noise = jax.random.normal(key, x.shape)
        losses = mean_squares(dense(params, x + noise)) * scale + shift
        return jnp.mean(losses), {"noise": noise}

    key = jax.random.key(0)
    direction = direction_like(DENSE)
    fn = value_grad_and_dots(loss_fn, argnums=3, batch_argnums=1, has_aux=True)
    result = fn(2.0, X, key, DENSE, shift=0.5, direction=direction, name="x")
    plain = jax.value_and_grad(loss_fn, argnums=3, has_aux=True)
    (value, aux), grads = plain(2.0, X, key, DENSE, shift=0.5)
    chex.assert_trees_all_close((result.value, result.aux, result.grads), (value, aux, grads))

    def rows(params, x):
        return 2 * mean_squares(dense(params, x + aux["noise"]))

    testing.assert_dots_close(result.dots, expected_dots(rows, DENSE, X, direction))


def test_several_parameter_arguments():
    def loss_fn(w, x, b):
        return jnp.mean(mean_squares(jnp.tanh(x @ w + b[None])))

    fn = value_grad_and_dots(loss_fn, argnums=(0, 2))
    w, b = DENSE["w"], DENSE["b"]
    result = fn(w, X, b, direction=(w, b))
    single = value_grad_and_dots(lambda p, x: loss_fn(p["w"], x, p["b"]))(DENSE, X, direction=DENSE)
    testing.assert_dots_close(list(result.dots), [single.dots["w"], single.dots["b"]])


def test_dots_lower_for_accelerators():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))
    jitted = jax.jit(lambda p, x, v: fn(p, x, direction=v).dots)
    exported = jax.export.export(jitted, platforms=["tpu", "cuda"])(DENSE, X, DENSE)
    assert exported.platforms == ("tpu", "cuda")
