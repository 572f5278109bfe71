"""Norms, pairs and clipped gradients, differentiated."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from ghostjax import (
    pairwise_dots,
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_grad_and_dots,
)
from models.arrays import direction_like, draw, mean_squares
from tests.norms.test_sharded import LOOPS

X = draw(2, 3, 12, 8, seed=3)


def row_gradients(row_losses):
    def grads(params, x):
        single = jax.grad(lambda p, row: row_losses(p, row[None])[0])
        return jax.vmap(single, (None, 0))(params, x)

    return grads


def plain_norms(row_losses):
    def norms(params, x):
        found = row_gradients(row_losses)(params, x)
        return jax.tree.map(lambda leaf: jnp.square(leaf).reshape(len(x), -1).sum(1), found)

    return norms


def plain_pairs(row_losses):
    def pairs(params, x):
        rows = jax.tree.map(
            lambda leaf: leaf.reshape(len(x), -1), row_gradients(row_losses)(params, x)
        )
        return jax.tree.map(lambda leaf: leaf @ leaf.T, rows)

    return pairs


def beside_dots(row_losses):
    """[B], of a mean over them, ``norms=True``."""
    fn = value_grad_and_dots(lambda p, x: jnp.mean(row_losses(p, x)), norms=True)
    return lambda p, x: fn(p, x, direction=direction_like(p)).squared_norms


QUANTITIES = {
    "norms": (squared_norms, plain_norms),
    "pairs": (pairwise_dots, plain_pairs),
    "beside_dots": (beside_dots, plain_norms),
}


@pytest.mark.quick("norms-pairs-1")
@pytest.mark.parametrize(
    ("quantity", "name", "argument"), [*itertools.product(QUANTITIES, LOOPS, [0, 1])]
)
def test_derivatives(quantity, name, argument):
    """As a penalty takes them; of several batches at once."""
    row_losses, params = LOOPS[name]

    def derivatives(function):
        def weighted(params, x):
            found = function(params, x)["w"]
            return jnp.sum(found * jnp.arange(1.0, 1 + found.size).reshape(found.shape))

        return jax.jit(jax.vmap(jax.grad(weighted, argument), (None, 0)))(params, X)

    own, plain = QUANTITIES[quantity]
    testing.assert_dots_close(derivatives(own(row_losses)), derivatives(plain(row_losses)))


PARAMS = {"w": draw(8, 3)}
GIVEN = PARAMS, X[0], jnp.float32(0.1), jnp.array([1.0, 0.5, 2.0])


def losses(params, x):
    return mean_squares(jnp.tanh(x @ params["w"]))


def clipped(params, x, max_norm, weights):
    return value_and_clipped_grad(losses, max_norm, weights=weights)(params, x)[1]


def plainly_clipped(params, x, max_norm, weights):
    rows = row_gradients(losses)(params, x)["w"]
    sizes = jnp.sqrt(jnp.sum(jnp.square(rows), axis=(1, 2)))
    return {"w": jnp.einsum("b,bio->io", weights * jnp.minimum(1, max_norm / sizes), rows)}


def derivative(function, argument):
    def penalty(*args):
        return jnp.sum(jnp.square(function(*args)["w"]))

    return jax.jit(jax.grad(penalty, argument))(*GIVEN)


@pytest.mark.quick("max_norm")
@pytest.mark.parametrize("argument", [1, 2, 3], ids=["data", "max_norm", "weights"])
def test_derivatives_of_clipped_gradients(argument):
    testing.assert_dots_close(derivative(clipped, argument), derivative(plainly_clipped, argument))


def test_clipped_gradients_have_none_by_parameters():
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated by the parameters"):
        derivative(clipped, 0)
