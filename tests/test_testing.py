"""The oracle on hand-computed numbers, and assertions that do fail."""

import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing

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
