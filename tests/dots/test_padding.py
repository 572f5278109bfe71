"""Rows that only fill a batch up, as in the last one of an epoch: the loss gives them no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import (
    GradDotProdEngine,
    InRunValues,
    pairwise_dots,
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_and_dots_fn,
    value_grad_and_dots,
)
from ghostjax.core import routes
from models.arrays import direction_like, directions_like, draw, mean_squares
from tests.dots.checks import expected_dots, expected_stacked
from tests.variants import crossed

REAL, PADDED, T, WIDTH, WORDS = 3, 2, 4, 6, 9
B = REAL + PADDED
PARAMS = {
    "table": draw(WORDS, WIDTH),
    "scale": 1 + draw(WIDTH) / 4,
    "first": draw(WIDTH, 8) / 2,
    "bias": draw(8),
    "second": draw(8, WIDTH) / 2,
}
IS_REAL = np.arange(B) % 2 == 0  # the others lie between them
NUMBERS = np.arange(B * T).reshape(B, T)
BATCH = {
    "ids": jnp.asarray(NUMBERS * 5 % WORDS),
    "x": draw(B, T, WIDTH, seed=1),
    "is_real": jnp.asarray(IS_REAL),
}
ALONE = jax.tree.map(lambda leaf: leaf[IS_REAL], BATCH)


def row_losses(params, batch):
    """[B]; a normalization among it, whose derivative divides."""
    h = batch["x"] + params["table"][batch["ids"]]
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-5)
    h = jnp.tanh((h * params["scale"][None, None]) @ params["first"] + params["bias"][None, None])
    return mean_squares(h @ params["second"] - batch["x"])


def weightless(losses, batch):
    """A product with zero would keep NaN."""
    return jnp.where(batch["is_real"], losses, 0)


def mean_of_real(params, batch):
    losses = weightless(row_losses(params, batch), batch)
    return jnp.sum(losses) / jnp.sum(batch["is_real"].astype(losses.dtype))


def cleaned(params, batch):
    """The loss that stands NaN: where before the network, and where behind it."""
    is_real = batch["is_real"][:, None, None]
    return mean_of_real(params, batch | {"x": jnp.where(is_real, batch["x"], 0)})


def with_rubbish(value):
    """In padded rows."""
    x = jnp.where(BATCH["is_real"][:, None, None], BATCH["x"], value)
    return BATCH | {"x": x}


def early(loss_fn, reduction):
    fn = value_grad_and_dots(loss_fn, loss_reduction=reduction)
    return lambda params, batch, direction: fn(params, batch, direction=direction).dots


def late(loss_fn, reduction):
    fn = value_and_dots_fn(loss_fn, loss_reduction=reduction)
    return lambda params, batch, direction: fn(params, batch)[2](direction)


def cast(tree, dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def assert_padding_is_zero(tree, axis=-1):
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        assert (leaf.compress(~IS_REAL, axis) == 0).all()
        assert (leaf.compress(IS_REAL, axis) != 0).any()


def of_real(tree):
    return jax.tree.map(lambda leaf: leaf[..., IS_REAL], tree)


@pytest.mark.parametrize(("form", "reduction"), crossed([early, late], ["mean", "sum"]))
def test_dots(form, reduction):
    """Shares of the loss are those of the batch without padding. A mean's dots are B shares, and
    B counts the padded rows."""
    direction = direction_like(PARAMS)
    found = jax.jit(form(mean_of_real, reduction))(PARAMS, BATCH, direction)
    assert_padding_is_zero(found)
    scale = {"mean": B / REAL, "sum": 1 / REAL}[reduction]
    expected = expected_dots(row_losses, PARAMS, ALONE, direction)
    testing.assert_dots_close(jax.tree.map(lambda leaf: leaf / scale, of_real(found)), expected)


@pytest.mark.parametrize("form", [early, late])
def test_bfloat16(form, standard_promotion):
    """By the same operations as without padding, in as many rows more."""
    params, batch, alone, direction = cast(
        (PARAMS, BATCH, ALONE, direction_like(PARAMS)), jnp.bfloat16
    )
    run = jax.jit(form(mean_of_real, "sum"))
    found = run(params, batch, direction)
    assert_padding_is_zero(found)
    testing.assert_dots_close(of_real(found), run(params, alone, direction), rtol=1e-6)


@pytest.mark.parametrize("form", [early, late])
def test_stacked_dots_by_the_loop_over_rows(form, monkeypatch):
    monkeypatch.setattr(routes, "rows_cost_less", lambda *args, **kwargs: True)
    directions = directions_like(PARAMS)
    found = jax.jit(form(mean_of_real, "sum"))(PARAMS, BATCH, directions)
    assert_padding_is_zero(found)
    expected = expected_stacked(row_losses, PARAMS, ALONE, directions)
    testing.assert_dots_close(of_real(found), jax.tree.map(lambda leaf: leaf / REAL, expected))


@pytest.mark.slow
def test_norms_and_pairs():
    grads = testing.per_example_grads(row_losses, PARAMS, ALONE)
    gram = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).reshape(REAL, -1) / REAL, grads)
    gram = jax.tree.map(lambda leaf: leaf @ leaf.T, gram)
    options = {"loss_reduction": "sum"}
    norms = jax.jit(squared_norms(mean_of_real, **options))(PARAMS, BATCH)
    pairs = jax.jit(pairwise_dots(mean_of_real, **options))(PARAMS, BATCH)
    direction = direction_like(PARAMS)
    fn = value_grad_and_dots(mean_of_real, norms=True, **options)
    result = jax.jit(lambda params, batch: fn(params, batch, direction=direction))(PARAMS, BATCH)
    for found in (norms, result.squared_norms):
        assert_padding_is_zero(found)
        testing.assert_dots_close(of_real(found), jax.tree.map(np.diagonal, gram))
    for axis in (0, 1):
        assert_padding_is_zero(pairs, axis)
    own = jax.tree.map(lambda leaf: leaf[IS_REAL][:, IS_REAL], pairs)
    testing.assert_dots_close(own, gram)


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping(max_norm):
    """The gradient is that of the real rows: padded ones have none to clip, and none to divide."""
    options = {"loss_reduction": "sum"}
    padded = jax.jit(value_and_clipped_grad(mean_of_real, max_norm, **options))(PARAMS, BATCH)
    alone = jax.jit(value_and_clipped_grad(mean_of_real, max_norm, **options))(PARAMS, ALONE)
    testing.assert_dots_close(padded, alone, rtol=1e-6)


def test_an_engine_with_padded_rows_on_both_sides():
    """Its dots refer to the mean over all validation rows, real or not."""

    def losses(params, batch):
        return weightless(row_losses(params, batch), batch)

    both = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[::-1]]), BATCH)
    result = jax.jit(GradDotProdEngine(losses, val_batch_size=B))(PARAMS, both)
    assert_padding_is_zero(result.dots)
    direction = jax.jit(jax.grad(lambda params: jnp.sum(row_losses(params, ALONE)) / B))(PARAMS)
    expected = expected_dots(row_losses, PARAMS, ALONE, direction)
    testing.assert_dots_close(of_real(result.dots), expected)


@pytest.mark.parametrize(("form", "rubbish"), crossed([early, late], [jnp.nan, jnp.inf, 1e30]))
def test_rubbish_does_not_pass_where_before_and_behind(form, rubbish):
    direction = direction_like(PARAMS)
    run = jax.jit(form(cleaned, "sum"))
    found = run(PARAMS, with_rubbish(rubbish), direction)
    jax.tree.map(np.testing.assert_array_equal, found, run(PARAMS, BATCH, direction))
    assert_padding_is_zero(found)


@pytest.mark.parametrize(
    "quantity", [squared_norms, pairwise_dots, lambda fn, **own: value_and_clipped_grad(fn, 1e-2)]
)
def test_rubbish_in_norms_pairs_and_clipping(quantity):
    run = jax.jit(quantity(cleaned, loss_reduction="sum"))
    found, clean = run(PARAMS, with_rubbish(jnp.nan)), run(PARAMS, BATCH)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.slow
@pytest.mark.parametrize("form", [early, late])
def test_rubbish_behind_one_where_stays_in_its_rows(form):
    """There the plain gradient itself is NaN. Dots are NaN in the rows whose data are, which
    ``InRunValues`` passes over by their ids, and nowhere else."""
    direction, rubbish = direction_like(PARAMS), with_rubbish(jnp.nan)
    plain = jax.jit(jax.grad(mean_of_real))(PARAMS, rubbish)
    assert np.isnan(plain["first"]).all()
    dots = jax.jit(form(mean_of_real, "sum"))
    found, clean = (dots(PARAMS, batch, direction) for batch in (rubbish, BATCH))
    total, expected = (sum(jax.tree.leaves(tree)) for tree in (found, clean))
    assert (np.isnan(total) == ~IS_REAL).all()
    np.testing.assert_array_equal(total[IS_REAL], expected[IS_REAL])
    ids = jnp.where(IS_REAL, jnp.arange(B), -1)
    values = InRunValues.zeros(B).add(ids, total).of("val")
    np.testing.assert_array_equal(values, jnp.where(IS_REAL, total, 0))


def test_ids_outside_of_the_table(standard_promotion):
    """JAX reads NaN there; behind a where its gradient is finite, and so are dots."""

    def loss_fn(params, batch):
        found = params["table"].at[batch["ids"]].get(mode="fill", fill_value=jnp.nan)
        h = jnp.where(batch["is_real"][:, None, None], found, 0)
        return mean_of_real(params, batch | {"x": h, "ids": jnp.zeros_like(batch["ids"])})

    direction = direction_like(PARAMS)
    outside = jnp.where(BATCH["is_real"][:, None], BATCH["ids"], WORDS + 3)
    for form in (early, late):
        run = jax.jit(form(loss_fn, "sum"))
        found, clean = (
            run(PARAMS, batch, direction) for batch in (BATCH | {"ids": outside}, BATCH)
        )
        jax.tree.map(np.testing.assert_array_equal, found, clean)
        assert_padding_is_zero(found)
