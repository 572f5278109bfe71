"""The three questions a record answers, and both orders of the dense contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax.linen import _records
from ghostjax.linen._records import Factors, Lookup, RowGradients, contract, gram_is_cheaper

ROWS = 7


def draw(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def records(positions, dtype=np.float32):
    return {
        "rows": RowGradients(draw(ROWS, 3, 4, dtype=dtype)),
        "matrix": Factors(
            draw(ROWS, positions, 6, dtype=dtype),
            draw(ROWS, positions, 5, seed=1, dtype=dtype),
            sizes=(6, 5),
            order=(0, 1),
        ),
        "transposed kernel of four axes": Factors(
            draw(ROWS, positions, 6, dtype=dtype),
            draw(ROWS, positions, 10, seed=1, dtype=dtype),
            sizes=(2, 3, 5, 2),
            order=(2, 0, 3, 1),
        ),
        "lookup": Lookup(
            jnp.asarray(np.random.default_rng(2).integers(-4, 8, (ROWS, positions))),
            draw(ROWS, positions, 3, dtype=dtype),
            table_size=6,
        ),
    }


@pytest.mark.parametrize("positions", [1, 7])
@pytest.mark.parametrize("name", records(1))
def test_total_and_dots_agree_with_the_rows(name, positions):
    record = records(positions)[name]
    rows = record.per_row()
    np.testing.assert_allclose(record.total(), rows.sum(0), rtol=1e-5, atol=1e-5)
    direction = draw(*rows.shape[1:], seed=5)
    expected = np.tensordot(rows, direction, axes=direction.ndim)
    np.testing.assert_allclose(record.dots(direction), expected, rtol=1e-4, atol=1e-5)


def test_factors_by_hand():
    record = Factors(
        jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.array([[[1.0], [10.0]]]), (2, 1), (1, 0)
    )
    np.testing.assert_array_equal(record.per_row(), [[[31.0, 42.0]]])


def test_lookup_by_hand():
    """Id 1 twice, -1 counts from the end, 5 is outside the table of 3."""
    record = Lookup(jnp.array([[1, 1, -1, 5]]), jnp.array([[[1.0], [2.0], [4.0], [8.0]]]), 3)
    np.testing.assert_array_equal(record.per_row(), [[[0.0], [3.0], [4.0]]])


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("val_rows", [2, 3])
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "multiplied_out"])
def test_both_orders_count_all_pairs_of_calls(monkeypatch, gram, val_rows, calls):
    monkeypatch.setattr(_records, "gram_is_cheaper", lambda *sizes: gram)
    factors = [
        Factors(draw(ROWS, t, 6, seed=t), draw(ROWS, t, 5, seed=9 - t), (6, 5), (0, 1))
        for t in range(1, calls + 1)
    ]
    rows = sum(np.asarray(record.per_row(), np.float64) for record in factors).reshape(ROWS, -1)
    expected = rows[:-val_rows] @ rows[-val_rows:].sum(0)
    found = contract(factors, ROWS - val_rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_different_kinds_of_use_are_summed_before_they_are_multiplied():
    lookup = Lookup(jnp.ones((ROWS, 2), jnp.int32), draw(ROWS, 2, 5), table_size=6)
    product = Factors(draw(ROWS, 3, 5), draw(ROWS, 3, 6, seed=1), sizes=(5, 6), order=(1, 0))
    rows = np.asarray(lookup.per_row() + product.per_row(), np.float64).reshape(ROWS, -1)
    found = contract([lookup, product], 4)
    np.testing.assert_allclose(found, rows[:4] @ rows[4:].sum(0), rtol=1e-4)


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "multiplied_out"])
def test_the_cheaper_order_is_that_of_the_flops(gram):
    """XLA's own count decides whether the choice by static shapes is right."""
    b, v, t, i, o = (8, 2, 2, 64, 64) if gram else (8, 8, 64, 8, 8)
    assert gram_is_cheaper(b, v, t, t, i, o) == gram
    inputs, cotangents = draw(b + v, t, i), draw(b + v, t, o)

    def flops(gram):
        def run(inputs, cotangents):
            record = Factors(inputs, cotangents, (i, o), (0, 1))
            train, val = record.rows(None, b), record.rows(b, None)
            return _records._gram_dots(train, val) if gram else train.dots(val.total())

        return jax.jit(run).lower(inputs, cotangents).compile().cost_analysis()["flops"]

    assert flops(gram) < flops(not gram)


def test_16_bit_operands_are_summed_in_float32():
    ones = jnp.ones((3, 4096, 1), jnp.bfloat16)
    record = Factors(ones, ones, (1, 1), (0, 1))
    np.testing.assert_array_equal(record.per_row(), np.full((3, 1, 1), 4096.0))
    np.testing.assert_array_equal(contract([record], 2), [4096.0**2] * 2)


def test_a_nan_reaches_its_own_row_only():
    clean = {name: contract([record], 4) for name, record in records(3).items()}
    for name, record in records(3).items():
        leaves, treedef = jax.tree.flatten(record)
        leaves[-1] = leaves[-1].at[1].set(jnp.nan)
        dots = contract([jax.tree.unflatten(treedef, leaves)], 4)
        assert np.isnan(dots[1]), name
        np.testing.assert_array_equal(dots[np.array([0, 2, 3])], clean[name][jnp.array([0, 2, 3])])
