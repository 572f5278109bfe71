"""Norms over pairs of positions and over windows: every kind of use, against per-row autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import squared_norms, testing
from ghostjax.core import squares, uses
from models.arrays import draw, mean_squares
from tests.norms.checks import Rows

ROWS, T, VOCABULARY, F = 5, 4, 40, 16
PARAMS = {"table": draw(VOCABULARY, F), "w": draw(F, F, seed=3) / 4}
IDS = jnp.asarray(np.random.default_rng(0).integers(-3, VOCABULARY + 9, (ROWS, T)))  # out of range
IN_RANGE = jnp.clip(IDS, 0, VOCABULARY - 1)


def cross_entropy(logits, ids=IN_RANGE):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[::-1])
    return jnp.mean(losses, axis=1)


def tied(p, ids):
    return cross_entropy(jnp.tanh(p["table"][ids] @ p["w"]) @ p["w"].T @ p["table"].T)


def looked_up_twice(p, ids):
    clamped = p["table"].at[ids].get(mode="clip")
    return cross_entropy((p["table"][ids] + clamped) @ p["w"] @ p["table"].T)


def positions_first(p, ids):
    h = p["table"][ids.T].astype(jnp.float32) @ p["w"]
    logits = h.reshape(-1, F) @ p["table"].T
    return cross_entropy(logits.reshape(T, -1, VOCABULARY).swapaxes(0, 1))


USES = {
    "tied": (tied, [2, 2]),
    "looked_up_twice": (looked_up_twice, [3]),
    "positions_first": (positions_first, [2]),
    "one_hot": (
        lambda p, ids: cross_entropy(
            jax.nn.one_hot(ids, VOCABULARY) @ p["table"] @ p["w"] @ p["table"].T
        ),
        [2],
    ),
    "zeros_out_of_range": (
        lambda p, ids: mean_squares(
            jnp.tanh(p["table"].at[ids].get(mode="fill", fill_value=0) @ p["w"] @ p["w"])
        ),
        [1, 2],
    ),
    "clamped": (lambda p, ids: mean_squares(jnp.sin(p["table"].at[ids].get(mode="clip"))), [1]),
    "dropped": (lambda p, ids: mean_squares(jnp.sin(p["table"][ids])), [1]),
}


@pytest.mark.quick("zeros_out_of_range", "positions_first", "one_hot", "clamped", "dropped")
@pytest.mark.parametrize("name", USES)
def test_uses_of_a_matrix(name, monkeypatch):
    losses, counts = USES[name]
    found = []
    monkeypatch.setattr("ghostjax._row_gradients.pair_squares", noting(uses.pair_squares, found))
    monkeypatch.setattr(squares, "pair_squares", noting(uses.pair_squares, found))
    norms = jax.jit(squared_norms(losses))(PARAMS, IDS)
    testing.assert_dots_close(norms, Rows.of(losses, PARAMS, IDS).squares())
    assert sorted(found) == counts


def noting(function, found):
    def noted(factors):
        found.append(len(factors))
        return function(factors)

    return noted


def test_pairs_are_taken_where_they_cost_less(monkeypatch):
    """Not for many positions and a small matrix."""
    found, params = [], {"table": draw(3, 2)}
    monkeypatch.setattr(squares, "pair_squares", noting(uses.pair_squares, found))
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 3, (ROWS, 60)))

    def losses(params, ids):
        return mean_squares(jnp.sin(params["table"][ids]))

    norms = jax.jit(squared_norms(losses))(params, ids)
    testing.assert_dots_close(norms, Rows.of(losses, params, ids).squares())
    assert found == []


def convolution(x, w, dims=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **options):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dims, **options)


IMAGES = (ROWS, 6, 7, 4)
CONVOLUTIONS = {
    "plain": (IMAGES, (3, 3, 4, 6), {}),
    "strided": (IMAGES, (3, 2, 4, 6), {"strides": (2, 3), "padding": "VALID"}),
    "dilated": (IMAGES, (3, 2, 4, 6), {"rhs_dilation": (2, 1), "strides": (1, 2)}),
    "transposed": (
        IMAGES,
        (3, 3, 4, 6),
        {"padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 2)},
    ),
    "cut_off": (IMAGES, (3, 3, 4, 6), {"padding": ((-1, 2), (0, -1))}),
    "groups": (IMAGES, (3, 3, 2, 6), {"feature_group_count": 2, "strides": (2, 1)}),
    "depthwise": (IMAGES, (3, 3, 1, 8), {"feature_group_count": 4}),
    "features_first": ((ROWS, 4, 6, 7), (6, 4, 3, 3), {"dims": ("NCHW", "OIHW", "NCHW")}),
    "sequence": (
        (ROWS, 9, 4),
        (3, 4, 6),
        {"dims": ("NTC", "TIO", "NTC"), "strides": (2,)},
    ),
    "whole_image": (IMAGES, (6, 7, 4, 6), {"padding": "VALID"}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, monkeypatch):
    shape, kernel, options = CONVOLUTIONS[name]
    found = []

    def noted(*args):
        found.append(args)
        return conv_squares(*args)

    conv_squares = squares.conv_squares
    monkeypatch.setattr(squares, "conv_squares", noted)
    params = {"w": draw(*kernel), "twice": draw(*kernel, seed=2)}
    x = draw(*shape, seed=1)

    def losses(params, x):
        once, first = (jnp.sin(convolution(x, params[name], **options)) for name in params)
        return mean_squares(once + first * convolution(jnp.cos(x), params["twice"], **options))

    norms = jax.jit(squared_norms(losses))(params, x)
    testing.assert_dots_close(norms, Rows.of(losses, params, x).squares())
    assert len(found) == 1


def test_large_windows():
    """A slice for every place in a window would take long to compile."""
    params, x = {"w": draw(16, 16, 1, 2), "twice": draw(16, 16, 1, 2)}, draw(2, 32, 32, 1)

    def losses(params, x):
        inputs = {"w": [x], "twice": [x, jnp.cos(x)]}
        options = {"strides": (16, 16), "padding": "VALID"}
        found = [convolution(x, params[name], **options) for name in inputs for x in inputs[name]]
        return mean_squares(jnp.sin(sum(found)))

    text = jax.jit(squared_norms(losses)).lower(params, x).as_text()
    assert text.count("stablehlo.slice") < 16 * 16


@pytest.mark.parametrize("shape", [(ROWS, 1, 4, 2), (ROWS, 3, 4, 0)])
def test_windows_of_nothing(shape):
    params = {"w": jnp.ones((2, 2, shape[-1], 3)), "twice": jnp.ones((2, 2, shape[-1], 3))}

    def losses(params, x):
        once, twice = (convolution(x, params[name], padding="VALID") for name in params)
        return mean_squares(once + twice * convolution(x, params["twice"], padding="VALID"))

    found = jax.jit(squared_norms(losses))(params, jnp.ones(shape))
    testing.assert_dots_close(found, {name: jnp.zeros(ROWS) for name in params})
