"""value_grad_and_dots against per-row autodiff: models of the linen table and plain functions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots
from models.arrays import POSITIONS, ROWS, direction_like, mean_squares
from models.functions import FUNCTIONS
from models.modules import CASES, KINDS
from tests.dots.checks import DENSE, X, check, dense, expected_dots, plain_and_errors
from tests.variants import crossed


@pytest.mark.quick("own_module_with_custom_vjp", "positions_in_a_module_of_their_own")
@pytest.mark.parametrize("name", KINDS)
def test_flax_models(name, standard_promotion):
    check(*CASES[name](ROWS, POSITIONS, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remat", "scan_of_remat"])
def test_rematerialised_models(name, standard_promotion):
    check(*CASES[name](ROWS, POSITIONS, jnp.float32), exact_gradient=False)


@pytest.mark.parametrize(("name", "reduction"), crossed(FUNCTIONS, ["mean", "sum"]))
def test_functions(name, reduction):
    check(*FUNCTIONS[name](), reduction, exact_gradient="checkpoint" not in name)


@pytest.mark.quick("positions_without_rows", "einsum_of_three", "low_rank_adapter")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_per_example(name):
    """The loss of one row, vectorized: the same results without any tracking."""
    losses, params, batch = FUNCTIONS[name]()
    direction = direction_like(params)

    def one(params, row):
        return losses(params, jax.tree.map(lambda leaf: leaf[None], row))[0], row

    fn = value_grad_and_dots(one, per_example=True, has_aux=True)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
    testing.assert_dots_close(result.dots, expected_dots(losses, params, batch, direction))
    chex.assert_trees_all_equal(result.aux, batch)
    certified = result, direction
    (_, grads), errors = plain_and_errors(
        lambda p, b: losses(p, b).mean(), params, batch, certified
    )
    chex.assert_trees_all_close(result.grads, grads, rtol=1e-4, atol=1e-6)
    assert max(errors) <= 1e-5


def test_weight_decay_belongs_to_no_row():
    def loss_fn(params, x):
        decay = sum(jnp.sum(leaf**2) for leaf in params.values())
        return jnp.mean(mean_squares(dense(params, x))) + 0.1 * decay

    direction = direction_like(DENSE)
    fn = value_grad_and_dots(loss_fn)
    result = jax.jit(lambda p, x, v: fn(p, x, direction=v))(DENSE, X, direction)
    expected = expected_dots(lambda p, x: mean_squares(dense(p, x)), DENSE, X, direction)
    testing.assert_dots_close(result.dots, expected)
    for name in DENSE:
        decay = 0.2 * jnp.vdot(DENSE[name], direction[name])
        np.testing.assert_allclose(result.shared[name], decay, rtol=1e-5)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def test_a_mean_over_all_tokens_of_the_batch():
    """Rows count by their tokens: dots[i] is row i's share, times B for "mean"."""
    mask = jnp.asarray(np.random.default_rng(3).integers(0, 2, (ROWS, 4)), jnp.float32)

    def shares(params, batch):
        losses = jnp.square(dense(params, batch["x"])) * batch["mask"]
        return jnp.sum(losses, axis=1) / jnp.sum(batch["mask"])

    check(shares, DENSE, {"x": X, "mask": mask}, "sum")


def test_bfloat16_dots_are_float32(standard_promotion):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), DENSE)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x)).astype(jnp.float32)))
    result = jax.jit(lambda p, x: fn(p, x, direction=p))(params, X.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype(jnp.float32)}
    rows = expected_dots(
        lambda p, x: mean_squares(dense(p, x)), params, X.astype(jnp.bfloat16), params
    )
    testing.assert_dots_close(result.dots, rows, rtol=1e-2)
