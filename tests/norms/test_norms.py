"""Squared norms and cosines: labels, arguments, dtypes and edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import (
    pairwise_dots,
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_grad_and_dots,
)
from ghostjax._errors import BatchError, ParameterError, RowAxisError
from models.arrays import ROWS, directions_like, draw, mean_squares
from tests.dots import packed
from tests.dots.checks import DENSE, X, dense
from tests.dots.test_moved_rows import PARAMS as MOVED_PARAMS
from tests.dots.test_moved_rows import X as MOVED_X
from tests.dots.test_moved_rows import mixed_by_data
from tests.norms.checks import Rows, check_all, mean_of

TIED = {"table": draw(9, 5), "w": draw(5, 5, seed=3)}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 9, (ROWS, 7)))
TOKENS = IDS[:, :-1], IDS[:, 1:]


def tied(params, batch):
    """[N]: a table that is looked up, a bias and a head; and one matrix twice."""
    ids, targets = batch
    h = params["table"][ids] + params["table"][None, :1]
    h = jnp.tanh(jnp.tanh(h @ params["w"]) @ params["w"])
    logits = h @ params["table"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses, axis=1)


def dense_losses(params, x):
    return mean_squares(dense(params, x))


@pytest.fixture(scope="module")
def rows_of_tied():
    return Rows.of(tied, TIED, TOKENS)


@pytest.mark.slow
def test_losses_of_all_rows(rows_of_tied):
    """[N] say nothing else than their sum, whatever the reduction."""
    for reduction in ("mean", "sum"):
        fn = jax.jit(squared_norms(tied, loss_reduction=reduction))
        testing.assert_dots_close(fn(TIED, TOKENS), rows_of_tied.squares())


@pytest.mark.slow
def test_one_row_at_a_time(rows_of_tied):
    def loss_of_row(params, row):
        return tied(params, jax.tree.map(lambda leaf: leaf[None], row))[0]

    check_all(loss_of_row, rows_of_tied, TIED, TOKENS, per_example=True)


def test_labels_of_rows(rows_of_tied):
    labels = jnp.array([0, 1, 1, 2, 0, -1])
    expected = rows_of_tied.added_up(labels, 3)
    given = {"labels": labels, "num_labels": 3}
    check_all(mean_of(tied), expected, TIED, TOKENS, labels=given)


def test_labels_of_positions():
    """Packed documents, with padding behind them."""
    params, batch = packed.parameters(), packed.packed_batch()
    loss = functools.partial(packed.token_losses, scan=False, remat=False)
    grad = jax.jit(jax.grad(lambda params, batch: jnp.sum(loss(params, batch))))
    apart = [grad(params, own) for own in packed.documents_apart(batch)]
    expected = Rows(jax.tree.map(lambda *leaves: np.stack(leaves), *apart))
    given = {"labels": batch["documents"], "num_labels": packed.DOCUMENTS}

    def loss_fn(params, batch):
        return jnp.sum(packed.token_losses(params, batch))

    check_all(loss_fn, expected, params, batch, labels=given, loss_reduction="sum")


def test_auxiliary_outputs_and_several_arguments():
    def loss_fn(w, x, b, *, gain):
        h = dense({"w": w, "b": b}, x) * gain
        return jnp.sum(mean_squares(h)), h

    options = {"argnums": (0, 2), "has_aux": True, "loss_reduction": "sum"}
    args, gain = (DENSE["w"], X, DENSE["b"]), jnp.float32(2)
    rows = Rows.of(lambda p, x: gain**2 * dense_losses(p, x), DENSE, X)
    norms = squared_norms(loss_fn, **options)(*args, gain=gain)
    expected = rows.squares()
    testing.assert_dots_close(norms, (expected["w"], expected["b"]))
    gram = pairwise_dots(loss_fn, **options)(*args, gain=gain)
    testing.assert_dots_close(gram, (rows.gram()["w"], rows.gram()["b"]))
    max_norm = float(np.median(rows.norms()))
    clipped = value_and_clipped_grad(loss_fn, max_norm, **options)
    (value, aux), grads = clipped(*args, gain=gain)
    expected = rows.clipped_sum(max_norm)
    testing.assert_dots_close(grads, (expected["w"], expected["b"]))
    np.testing.assert_allclose((value, aux[0, 0]), (loss_fn(*args, gain=gain)[0], aux[0, 0]))
    assert aux.shape == (ROWS, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float64, marks=pytest.mark.slow)], ids=["bf16", "f64"]
)
def test_dtypes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
        params, x = cast(DENSE), X.astype(dtype)
        # Cotangents that bfloat16 can hold: products are what is to be exact.
        losses = lambda p, x: jnp.sum(x @ p["w"] + p["b"][None], axis=1).astype(jnp.float32)  # noqa: E731
        rows = Rows.of(losses, params, x)
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        exact = 1e-12 if dtype == jnp.float64 else 1e-5
        rounded = 1e-12 if dtype == jnp.float64 else 1e-2  # products in the model's dtype
        for fn, expected, rtol in (
            (squared_norms(losses), rows.squares(), exact),
            (pairwise_dots(losses), rows.gram(), rounded),
        ):
            found = jax.jit(fn)(params, x)
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(wide)}
            testing.assert_dots_close(found, expected, rtol=rtol)
        grads = jax.jit(value_and_clipped_grad(losses, 1.0))(params, x)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
        testing.assert_dots_close(grads, rows.clipped_sum(1.0), rtol=rounded)


@pytest.mark.slow
def test_decay_in_the_loss_is_in_no_norm():
    def loss_fn(params, x):
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean(dense_losses(params, x)) + decay

    rows = Rows.of(dense_losses, DENSE, X)
    testing.assert_dots_close(squared_norms(loss_fn)(DENSE, X), rows.squares())
    testing.assert_dots_close(pairwise_dots(loss_fn)(DENSE, X), rows.gram())
    with pytest.raises(ValueError, match=r"(?s)\['w'\] in .*optax.add_decayed_weights"):
        value_and_clipped_grad(loss_fn, 1.0)(DENSE, X)


def test_norms_of_permuted_rows_are_permuted(rows_of_tied):
    order = jnp.array([3, 1, 5, 0, 2, 4])
    fn = jax.jit(squared_norms(mean_of(tied)))
    norms = fn(TIED, jax.tree.map(lambda leaf: leaf[order], TOKENS))
    expected = jax.tree.map(lambda leaf: leaf[order], rows_of_tied.squares())
    testing.assert_dots_close(norms, expected)


def test_a_batch_of_one_row():
    check_all(mean_of(dense_losses), Rows.of(dense_losses, DENSE, X[:1]), DENSE, X[:1])


def test_parameters_that_nothing_uses():
    params = DENSE | {"unused": draw(3)}
    norms = squared_norms(mean_of(dense_losses))(params, X)
    np.testing.assert_array_equal(norms["unused"], np.zeros(ROWS))
    gram = pairwise_dots(mean_of(dense_losses))(params, X)
    np.testing.assert_array_equal(gram["unused"], np.zeros((ROWS, ROWS)))
    grads = value_and_clipped_grad(mean_of(dense_losses), 1.0)(params, X)[1]
    np.testing.assert_array_equal(grads["unused"], np.zeros(3))


def test_no_parameters():
    def loss_fn(params, x):
        del params
        return jnp.mean(x)

    assert squared_norms(loss_fn)({}, X) == {}
    assert pairwise_dots(loss_fn)({}, X) == {}
    value, grads = value_and_clipped_grad(loss_fn, 1.0)({}, X)
    assert grads == {}
    np.testing.assert_allclose(value, jnp.mean(X), rtol=1e-6)


@pytest.mark.slow
def test_cosines_of_several_directions():
    directions = directions_like(DENSE)
    directions = jax.tree.map(lambda leaf: leaf.at[1].set(0), directions)
    x = X.at[2].set(0)  # and so is the gradient of this row
    params = DENSE | {"b": jnp.zeros(4)}
    fn = value_grad_and_dots(mean_of(dense_losses), norms=True)
    result = jax.jit(lambda p, x, v: fn(p, x, direction=v))(params, x, directions)
    cosine = result.cosine(directions)
    rows = Rows.of(dense_losses, params, x)
    testing.assert_dots_close(result.squared_norms, rows.squares())
    for k in (0, 2):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], directions)
        size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(own)))
        norms = rows.norms() * size
        dots = sum(jax.tree.leaves(rows.dots(own)))
        expected = np.where(norms > 0, dots / np.where(norms > 0, norms, 1), 0)
        np.testing.assert_allclose(cosine[k], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cosine[1], np.zeros(ROWS))
    np.testing.assert_array_equal(cosine[:, 2], np.zeros(3))


def test_cosine_needs_norms():
    result = value_grad_and_dots(mean_of(dense_losses))(DENSE, X, direction=DENSE)
    with pytest.raises(ValueError, match="norms=True"):
        result.cosine(DENSE)


@pytest.mark.slow
def test_rows_that_data_mix_are_not_a_number():
    p, x = MOVED_PARAMS, MOVED_X
    result = value_grad_and_dots(mixed_by_data, norms=True)(p, x, direction=p)
    found = (
        squared_norms(mixed_by_data)(p, x),
        pairwise_dots(mixed_by_data)(p, x),
        value_and_clipped_grad(mixed_by_data, 1.0)(p, x)[1],
        result.squared_norms,
    )
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(found))


def coupled(params, x):
    h = dense(params, x)
    return jnp.mean(jnp.square((h - jnp.mean(h, axis=0, keepdims=True)) @ params["w"].T))


CALLS = {
    "squared_norms": squared_norms,
    "pairwise_dots": pairwise_dots,
    "value_and_clipped_grad": lambda loss_fn, **options: value_and_clipped_grad(
        loss_fn, 1.0, **options
    ),
    "norms": lambda loss_fn, **options: (
        lambda p, x, **given: value_grad_and_dots(loss_fn, norms=True, **options)(
            p, x, direction=p, **given
        )
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused(name):
    call = CALLS[name]
    mean = mean_of(dense_losses)
    with pytest.raises(RowAxisError, match="combines rows with a value in which rows are mixed"):
        call(coupled)(DENSE, X)
    with pytest.raises(RowAxisError, match=r"pass per_example=True(?! to)"):
        call(lambda p, x: jnp.mean(jnp.tanh(dense(p, x) @ dense(p, x).T)))(DENSE, X)
    with pytest.raises(ValueError, match="loss_reduction must be"):
        call(mean, loss_reduction="max")(DENSE, X)
    with pytest.raises(ParameterError, match="real floating-point"):
        call(mean)({"w": jnp.ones((5, 4), int), "b": DENSE["b"]}, X)
    with pytest.raises(BatchError, match="leading size"):
        call(lambda p, b: mean(p, b[0]))(DENSE, (X, X[:2]))
    with pytest.raises(BatchError, match="batch has no rows"):
        call(mean)(DENSE, X[:0])
    with pytest.raises(ValueError, match="labels and num_labels go together"):
        call(mean)(DENSE, X, labels=jnp.arange(ROWS))
    with pytest.raises(ValueError, match="must return a scalar loss"):
        call(lambda p, x: dense(p, x))(DENSE, X)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "norms"])
def test_losses_that_are_not_those_of_rows(name):
    with pytest.raises(ValueError, match=r"losses of all rows, \[N\]. Found \[4\] for 6 rows"):
        CALLS[name](lambda p, x: jnp.sum(dense(p, x), axis=0))(DENSE, X)
