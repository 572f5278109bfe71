"""pairwise_dots: training by validation rows, the Gram matrix, and blocks of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine, pairwise_dots, squared_norms, testing
from ghostjax._errors import BatchError
from models.arrays import ROWS, mean_squares
from tests.norms.checks import Rows, mean_of
from tests.norms.test_norms import TIED, TOKENS, tied

V = 2


@pytest.fixture(scope="module")
def rows():
    return Rows.of(tied, TIED, TOKENS)


@pytest.mark.slow
def test_validation_rows_and_their_sums(rows):
    fn = pairwise_dots(tied, val_batch_size=V)
    pairs = jax.jit(fn)(TIED, TOKENS)
    expected = jax.tree.map(lambda leaf: leaf[:-V, -V:], rows.gram())
    testing.assert_dots_close(pairs, expected)
    engine = GradDotProdEngine(tied, val_batch_size=V)(TIED, TOKENS)
    sums = jax.tree.map(lambda leaf: leaf.sum(axis=1) / V, pairs)
    testing.assert_dots_close(sums, engine.dots)


@pytest.mark.parametrize("budget", [1, 600, 10**6], ids=["one_row", "ragged", "all"])
def test_blocks(rows, budget):
    """280 bytes a row."""
    gram = jax.jit(pairwise_dots(mean_of(tied), budget=budget))(TIED, TOKENS)
    testing.assert_dots_close(gram, rows.gram())


def test_memory_is_bounded_by_the_budget():
    """Of the gradients of 64 validation rows, 32 KiB each, as many as the budget allows."""
    params = {"w": jnp.zeros((64, 64)), "v": jnp.zeros((64, 64))}
    one, count = 2 * 64 * 64 * 4, 64

    def losses(params, x):
        return mean_squares(jnp.tanh(x @ params["w"]) @ params["v"])

    def scratch(budget):
        fn = jax.jit(pairwise_dots(losses, val_batch_size=count, budget=budget))
        compiled = fn.lower(params, jnp.zeros((2 * count, 4, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    least = scratch(1)
    # Those of a block, and a copy of theirs; but not what a larger block takes.
    for block in (4, 16):
        assert scratch(block * one) <= least + 2 * block * one
    assert scratch(count * one) >= least + count * one / 2


def test_norms_are_on_the_diagonal():
    gram = jax.jit(pairwise_dots(tied))(TIED, TOKENS)
    norms = jax.jit(squared_norms(tied))(TIED, TOKENS)
    testing.assert_dots_close(jax.tree.map(jnp.diagonal, gram), norms)
    for leaf in jax.tree.leaves(gram):
        np.testing.assert_allclose(leaf, leaf.T, rtol=1e-4, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="budget must be a positive number of bytes, got 0"):
        pairwise_dots(tied, budget=0)
    with pytest.raises(BatchError, match="val_batch_size must be at least 1"):
        pairwise_dots(tied, val_batch_size=0)
    with pytest.raises(TypeError, match="val_batch_size must be a Python int"):
        pairwise_dots(tied, val_batch_size=1.5)
    with pytest.raises(BatchError, match="smaller than the number of rows"):
        pairwise_dots(tied, val_batch_size=ROWS)(TIED, TOKENS)
    given = {"labels": jnp.arange(ROWS), "num_labels": ROWS}
    with pytest.raises(ValueError, match="Leave out val_batch_size"):
        pairwise_dots(tied, val_batch_size=V)(TIED, TOKENS, **given)
