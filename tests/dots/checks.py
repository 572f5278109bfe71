"""Per-row autodiff beside value_grad_and_dots, for every test of this folder."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ghostjax import conservation_error, testing, value_grad_and_dots

ROWS, POSITIONS, FEATURES = 6, 6, 5  # T = B: no axis is told by its size


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def direction_like(params):
    generator = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), params
    )


def expected_dots(row_losses, params, batch, direction):
    grads = testing.per_example_grads(row_losses, params, batch)
    return jax.tree.map(
        lambda rows, vector: np.tensordot(
            np.asarray(rows, np.float64), np.asarray(vector, np.float64), axes=vector.ndim
        ),
        grads,
        direction,
    )


def one_by_one(row_losses, params, batch, direction):
    """The same from batches of one row, whose gradients nothing vectorizes or adds up."""

    grad = jax.jit(jax.grad(lambda params, single: row_losses(params, single)[0]))

    def dots(row):
        grads = grad(params, jax.tree.map(lambda leaf: leaf[row : row + 1], batch))
        return jax.tree.map(
            lambda grad, vector: np.vdot(
                np.asarray(grad, np.float64), np.asarray(vector, np.float64)
            ),
            grads,
            direction,
        )

    rows = [dots(row) for row in range(jax.tree.leaves(batch)[0].shape[0])]
    return jax.tree.map(lambda *found: np.stack(found), *rows)


def check(row_losses, params, batch, reduction="mean", *, exact_gradient=True):
    """Dots, value, gradient and certificate of the mean or sum of ``row_losses``."""
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[reduction]
    direction = direction_like(params)

    def loss_fn(params, batch):
        return reduce(row_losses(params, batch))

    fn = value_grad_and_dots(loss_fn, loss_reduction=reduction)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
    testing.assert_dots_close(
        result.dots, expected_dots(row_losses, params, batch, direction), rtol=1e-5
    )
    value, grads = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    if exact_gradient:
        chex.assert_trees_all_equal((result.value, result.grads), (value, grads))
    else:
        testing.assert_dots_close((result.value, result.grads), (value, grads), rtol=1e-6)
    errors = jax.tree.leaves(conservation_error(result, direction))
    assert max(errors) <= 1e-5
    return result


def mean_squares(outputs):
    return jnp.mean(jnp.square(outputs).reshape(outputs.shape[0], -1), axis=1)


def activations(seed=1):
    return draw(ROWS, POSITIONS, FEATURES, seed=seed)


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


DENSE = {"w": draw(FEATURES, 4), "b": draw(4)}
X = draw(ROWS, FEATURES, seed=1)
