"""value_and_clipped_grad: weights, padding, the largest norm, and rows of no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import testing, value_and_clipped_grad
from models.arrays import ROWS, draw, mean_squares
from tests.dots.checks import DENSE, X, dense
from tests.norms.checks import Rows, mean_of

WEIGHTS = jnp.array([1.0, 0, 2, 1, 0.5, 1])


def losses(params, x):
    return mean_squares(dense(params, x))


@pytest.fixture(scope="module")
def rows():
    return Rows.of(losses, DENSE, X)


@pytest.mark.slow
@pytest.mark.parametrize("per_example", [False, True], ids=["batch", "one_row"])
def test_weights(rows, per_example):
    max_norm = float(np.median(rows.norms()))

    def of_row(params, row):
        return losses(params, row[None])[0]

    loss_fn = of_row if per_example else mean_of(losses)
    fn = value_and_clipped_grad(loss_fn, max_norm, weights=WEIGHTS, per_example=per_example)
    value, grads = jax.jit(fn)(DENSE, X)
    expected = jax.tree.map(lambda leaf: leaf / ROWS, rows.clipped_sum(max_norm, WEIGHTS))
    testing.assert_dots_close(grads, expected)
    np.testing.assert_allclose(value, jnp.mean(losses(DENSE, X)), rtol=1e-6)


def test_a_norm_that_is_traced(rows):
    @jax.jit
    def run(max_norm):
        return value_and_clipped_grad(losses, max_norm)(DENSE, X)[1]

    for max_norm in (0.01, 1e6):
        testing.assert_dots_close(run(max_norm), rows.clipped_sum(max_norm))


@pytest.mark.slow
@pytest.mark.parametrize("per_example", [False, True], ids=["batch", "one_row"])
def test_padding_whatever_it_is(rows, per_example):
    """Rows of weight 0 that are not finite leave no trace."""
    padded = jnp.concatenate([X, jnp.full_like(X[:2], jnp.nan)])
    weights = jnp.arange(len(padded)) < ROWS

    def of_row(params, row):
        return losses(params, row[None])[0]

    loss_fn = of_row if per_example else losses
    options = {"per_example": per_example, "loss_reduction": "sum"}
    fn = value_and_clipped_grad(loss_fn, 0.3, weights=weights, **options)
    testing.assert_dots_close(jax.jit(fn)(DENSE, padded)[1], rows.clipped_sum(0.3))


@pytest.mark.slow
@pytest.mark.parametrize("size", [jnp.nan, 1e25], ids=["nan", "overflow"])
def test_a_row_that_is_not_finite_and_counts(size):
    """Also one whose gradient is finite but its square is not: it is not left out in silence."""

    def linear(params, x):
        return jnp.sum(x @ params["w"] + params["b"][None], axis=1)

    grads = value_and_clipped_grad(linear, 0.3)(DENSE, X.at[0].set(size))[1]
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(grads))


def test_rows_without_gradient_stay_so():
    params = DENSE | {"b": jnp.zeros(4)}
    grads = value_and_clipped_grad(losses, 1e-3)(params, jnp.zeros_like(X))[1]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_what_optax_does_to_gradients_of_rows(rows):
    gradients = jax.tree.map(jnp.float32, rows.gradients)
    expected, _ = optax.per_example_global_norm_clip(jax.tree.leaves(gradients), 0.2)
    grads = jax.jit(value_and_clipped_grad(losses, 0.2))(DENSE, X)[1]
    testing.assert_dots_close(jax.tree.leaves(grads), expected)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), np.ones(2)])
def test_a_norm_that_is_none(max_norm):
    with pytest.raises(ValueError, match="max_norm must be a positive number"):
        value_and_clipped_grad(losses, max_norm)


def test_numbers_that_are_none_when_it_runs():
    """They cannot be refused where they are traced, and the gradient is no number then."""

    def run(max_norm, weights):
        return value_and_clipped_grad(losses, max_norm, weights=weights)(DENSE, X)[1]

    good, run = jnp.ones(ROWS), jax.jit(run)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(run(0.1, good)))
    faults = [(0.0, good), (-1.0, good), (jnp.nan, good)]
    faults += [(0.1, good.at[0].set(bad)) for bad in (-1.0, jnp.nan)]
    for fault in faults:
        assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(run(*fault))), fault


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_weights_that_are_negative_or_no_number(bad):
    weights = jnp.ones(ROWS).at[0].set(bad)
    with pytest.raises(ValueError, match="weights must not be negative or NaN"):
        jax.jit(value_and_clipped_grad(losses, 1.0, weights=weights))(DENSE, X)


def test_weights_that_are_all_zero():
    grads = value_and_clipped_grad(losses, 1.0, weights=jnp.zeros(ROWS))(DENSE, X)[1]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("weights", [jnp.ones(4), jnp.ones(ROWS, int), 1.0])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="weights must be floats or booleans, one for each of the"):
        value_and_clipped_grad(losses, 1.0, weights=weights)(DENSE, X)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="newer versions of XLA keep more: docs/pages/private.md"
)
def test_memory_is_about_that_of_a_plain_step():
    """The second backward pass does nothing early that would have to be kept."""
    params, x = [draw(64, 64, seed=n) / 8 for n in range(4)], draw(64, 8, 64)

    def losses(params, x):
        for matrix in params:
            x = x @ matrix
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
            x = jax.nn.relu(x)
        return mean_squares(x)

    def scratch(function):
        return jax.jit(function).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    plain = scratch(jax.grad(lambda params, x: jnp.sum(losses(params, x))))
    assert scratch(value_and_clipped_grad(losses, 1.0)) <= 1.2 * plain
