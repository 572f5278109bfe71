"""The oracle on hand-computed numbers, and assertions that do fail."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing
from tests.dots import packed

W = {"w": jnp.array([1.0, -1.0])}
X = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])


def loss_fn(params, batch, scale=1.0):
    return scale * jnp.square(batch @ params["w"]) / 2  # gradient: scale * (x . w) x, x . w = -1


def test_per_example_grads_by_hand():
    grads = testing.per_example_grads(loss_fn, W, X)
    np.testing.assert_array_equal(grads["w"], -X)
    grads = testing.per_example_grads(loss_fn, W, X, scale=2.0)
    np.testing.assert_array_equal(grads["w"], -2 * X)


def test_per_example_dots_by_hand():
    """The mean validation row is (6, 7)."""
    dots = testing.per_example_dots(loss_fn, W, X, 2)
    np.testing.assert_array_equal(dots["w"], [1 * 6 + 2 * 7, 3 * 6 + 4 * 7])
    assert dots["w"].dtype == np.float64


def test_relative_errors_by_hand():
    expected = {"a": np.array([4.0, -8.0]), "b": np.array([1e-9, 0.0])}
    errors = testing.relative_errors({"a": np.array([4.0, -8.8]), "b": np.zeros(2)}, expected)
    assert errors["['a']"] == pytest.approx(0.1)
    assert errors["['b']"] == pytest.approx(1e-9 / 8e-3)  # against a thousandth of the largest


@pytest.mark.parametrize(
    ("dots", "message"),
    [
        ({"a": np.array([1.0, 2.1])}, r"\['a'\]: 5.00e-02"),
        ({"a": np.array([1.0, np.nan])}, r"\['a'\]: nan"),
        ({"a": np.array([1.0])}, r"expected shape \(2,\), found \(1,\)"),
        ({"b": np.array([1.0, 2.0])}, "trees differ"),
    ],
)
def test_assert_dots_close_fails(dots, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_dots_close(dots, {"a": np.array([1.0, 2.0])})


def test_assert_dots_close_of_zeros():
    testing.assert_dots_close({"a": np.zeros(2)}, {"a": np.zeros(2)})
    with pytest.raises(AssertionError):
        testing.assert_dots_close({"a": np.ones(2)}, {"a": np.zeros(2)})


PARAMS, BATCH = packed.parameters(), packed.packed_batch()


def packed_losses(**changes):
    """Losses of tokens, with other things in the batch than they ought to be."""

    def losses_fn(tokens):
        return packed.token_losses(PARAMS, {**BATCH, **changes, "tokens": tokens})

    return losses_fn


@pytest.mark.parametrize("rtol", [0.0, 1e-5])
def test_documents_behind_a_segment_mask_are_apart(rtol):
    tokens, labels = BATCH["tokens"], BATCH["documents"]
    testing.assert_documents_apart(packed_losses(), tokens, labels, rtol=rtol)


def test_documents_without_a_mask_are_not_apart():
    """Row 1 has documents 2 and 3 of 6 and 4 tokens; the loss at a boundary leaks, too."""
    losses_fn = packed_losses(documents=jnp.zeros_like(BATCH["documents"]))
    with pytest.raises(AssertionError) as raised:
        testing.assert_documents_apart(losses_fn, BATCH["tokens"], BATCH["documents"])
    found = re.findall(
        r"document (\d) at row (\d), positions ([\d, ]+) by .* with (.+)", str(raised.value)
    )
    assert ("3", "1", "6, 7, 8", "document 2") in found
    assert ("2", "1", "5", "document 3") in found
    assert ("1", "0", "7", "the padding") in found
    rows = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    assert all(rows[int(seer)] == int(row) for seer, row, _, _ in found)


def test_floats_that_leak_by_one_position_are_found():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    labels = jnp.array([[0, 0, 1, 1], [2, 2, 2, -1]])

    def own(x):
        return jnp.sum(jnp.square(x["x"]), axis=-1)

    testing.assert_documents_apart(own, {"x": x}, labels, rtol=0)
    with pytest.raises(AssertionError, match=r"document 1 at row 0, positions 2 by .*document 0"):
        testing.assert_documents_apart(
            lambda x: own(x) + jnp.roll(own(x), 1, axis=1), {"x": x}, labels
        )


def test_rows_that_see_each_other_and_padding_that_is_seen_are_found():
    tokens, labels = jnp.arange(8).reshape(2, 4), jnp.array([[0, 0, 0, 0], [1, 1, -1, -2]])
    with pytest.raises(AssertionError) as raised:
        testing.assert_documents_apart(lambda x: x - jnp.sum(x, axis=0)[None], tokens, labels)
    assert "document 0 at row 0, positions 0, 1 by up to" in str(raised.value)
    assert "document 1 at row 1, positions 0, 1 by up to" in str(raised.value)
    with pytest.raises(AssertionError, match=r"document 1 at row 1, positions 0, 1 .*the padding"):
        testing.assert_documents_apart(
            lambda x: x + jnp.flip(x, axis=1).at[0].set(0), tokens, labels
        )


def test_many_pairs_are_counted():
    labels = jnp.arange(10).reshape(5, 2) // 2
    with pytest.raises(AssertionError, match="and 12 more pairs"):
        testing.assert_documents_apart(
            lambda x: x - jnp.sum(x), jnp.arange(10).reshape(5, 2), labels
        )


TOKENS, LABELS = jnp.arange(6).reshape(2, 3), jnp.array([[0, 0, 1], [2, 2, 2]])


@pytest.mark.parametrize(
    ("losses_fn", "tokens", "labels", "error", "message"),
    [
        (jnp.zeros_like, TOKENS, LABELS, AssertionError, "no loss changes with any document"),
        (
            lambda x: jnp.log(-x.astype(float)),
            TOKENS,
            LABELS,
            AssertionError,
            "losses are not finite",
        ),
        (jnp.sum, TOKENS, LABELS, ValueError, r"losses of shape \[2, 3\].* Found \[\]"),
        (lambda x: x, TOKENS * 0, LABELS, ValueError, "hold one number alone"),
        (lambda x: x, TOKENS, LABELS[0], ValueError, r"integers \[B, T\].*int32\[3\]"),
        (lambda x: x, TOKENS[0], LABELS, ValueError, r"inputs of shapes \[\(3,\)\]"),
        (lambda x: x, {}, LABELS, ValueError, r"inputs of shapes \[\]"),
    ],
)
def test_what_cannot_be_tested_is_an_error(losses_fn, tokens, labels, error, message):
    with pytest.raises(error, match=message):
        testing.assert_documents_apart(losses_fn, tokens, labels)


def test_a_mean_over_positions_is_seen_though_two_tokens_change_places():
    tokens, labels = jnp.array([[1, 2, 1, 2]]), jnp.array([[0, 0, 1, 1]])
    with pytest.raises(AssertionError, match="document 1 at row 0, positions 2, 3"):
        testing.assert_documents_apart(lambda x: jnp.cumsum(x, axis=1), tokens, labels)
