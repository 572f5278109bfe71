"""Per-row autodiff beside value_grad_and_dots, for every test of this folder."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import FEATURES, ROWS, direction_like, directions_like, draw


def expected_dots(row_losses, params, batch, direction):
    grads = testing.per_example_grads(row_losses, params, batch)
    return jax.tree.map(
        lambda rows, vector: np.tensordot(
            np.asarray(rows, np.float64), np.asarray(vector, np.float64), axes=vector.ndim
        ),
        grads,
        direction,
    )


def expected_stacked(row_losses, params, batch, directions):
    """The same for stacked directions: a tree of [K, B]."""
    grads = testing.per_example_grads(row_losses, params, batch)

    def products(rows, vectors):
        rows, vectors = (np.asarray(array, np.float64) for array in (rows, vectors))
        return vectors.reshape(len(vectors), -1) @ rows.reshape(len(rows), -1).T

    return jax.tree.map(products, grads, directions)


def one_by_one(row_losses, params, batch, direction):
    """``expected_dots`` from batches of one row, whose gradients nothing vectorizes or adds up."""

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
    plain, errors = plain_and_errors(loss_fn, params, batch, (result, direction))
    if exact_gradient:
        chex.assert_trees_all_equal((result.value, result.grads), plain)
    else:
        testing.assert_dots_close((result.value, result.grads), plain, rtol=1e-6)
    assert max(errors) <= 1e-5
    return result


def plain_and_errors(loss_fn, params, batch, *certified):
    """What training without ghostjax gives, and the largest errors of certificates of results with
    their directions; in one program, as compiling several is most of a test's time."""

    @jax.jit
    def run(params, batch, certified):
        errors = jax.tree.leaves([conservation_error(*pair) for pair in certified])
        return jax.value_and_grad(loss_fn)(params, batch), list(map(jnp.max, errors))

    return run(params, batch, certified)


def check_late(row_losses, params, batch, reduction="mean", *, exact_gradient=True):
    """The same of ``value_and_dots_fn``, with one direction and with several."""
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[reduction]
    directions = directions_like(params)
    first = jax.tree.map(lambda leaf: leaf[0], directions)

    def loss_fn(params, batch):
        return reduce(row_losses(params, batch))

    fn = value_and_dots_fn(loss_fn, loss_reduction=reduction)

    @jax.jit
    def run(params, batch, first, directions):
        value, grads, dots = fn(params, batch)
        return value, grads, dots.result(first), dots.result(directions)

    value, grads, one, several = run(params, batch, first, directions)
    expected = expected_stacked(row_losses, params, batch, directions)
    testing.assert_dots_close(several.dots, expected)
    testing.assert_dots_close(one.dots, jax.tree.map(lambda leaf: leaf[0], expected))
    certified = (one, first), (several, directions)
    plain, errors = plain_and_errors(loss_fn, params, batch, *certified)
    if exact_gradient:
        chex.assert_trees_all_equal((value, grads), plain)
    else:
        testing.assert_dots_close((value, grads), plain, rtol=1e-6)
    assert max(errors) <= 1e-5


def check_loss(loss_fn, row_losses, params, batch, *, exact_gradient=True):
    """The dots of a loss that moves rows, early, late and stacked, against those of ``row_losses``,
    whose mean it is."""
    directions = directions_like(params)
    first = jax.tree.map(lambda leaf: leaf[0], directions)
    late = value_and_dots_fn(loss_fn)

    @jax.jit
    def run(params, batch, first, directions):
        result = value_grad_and_dots(loss_fn)(params, batch, direction=first)
        return result, late(params, batch)[2].result(directions)

    one, several = run(params, batch, first, directions)
    expected = expected_stacked(row_losses, params, batch, directions)
    testing.assert_dots_close(one.dots, jax.tree.map(lambda leaf: leaf[0], expected))
    testing.assert_dots_close(several.dots, expected)
    certified = (one, first), (several, directions)
    plain, errors = plain_and_errors(loss_fn, params, batch, *certified)
    if exact_gradient:
        chex.assert_trees_all_equal((one.value, one.grads), plain)
    else:
        testing.assert_dots_close((one.value, one.grads), plain, rtol=1e-6)
    assert (int(one.conflicts), int(several.conflicts)) == (0, 0)
    assert max(errors) <= 1e-5
    return one


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


DENSE = {"w": draw(FEATURES, 4), "b": draw(4)}
X = draw(ROWS, FEATURES, seed=1)
