"""Losses whose ``custom_vjp`` sums over rows itself, with the head's weights inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import (
    pairwise_dots,
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_and_dots_fn,
    value_grad_and_dots,
)
from tests.dots.checks import check, check_late, direction_like, draw, expected_dots

B, T, D, F, V = 4, 3, 5, 6, 7
P = {"w": draw(D, F, seed=1), "head": draw(F, V, seed=2), "table": draw(V, D, seed=3)}
BATCH = {
    "x": draw(B, T, D, seed=4),
    "y": jnp.asarray(np.random.default_rng(5).integers(0, V, (B, T))),
}


def losses_of(h, head, y):
    logits = (h @ head).astype(jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, y[..., None], -1)[..., 0]


def fused_with(backward):
    @jax.custom_vjp
    def fused(h, head, y):
        return jnp.sum(losses_of(h, head, y))

    def rule(kept, c):
        h, head, y = kept
        d = (jax.nn.softmax((h @ head).astype(jnp.float32)) - jax.nn.one_hot(y, V)) * c
        return backward(h, head, d)

    fused.defvjp(lambda h, head, y: (fused(h, head, y), (h, head, y)), rule)
    return fused


def gradients(h, head, d):
    d = d.astype(h.dtype)
    return d @ head.T, jnp.einsum("...f,...v->fv", h, d), None


fused = fused_with(gradients)


def hidden(p, batch):
    return jnp.tanh((batch["x"] + p["table"][batch["y"]]) @ p["w"])


def row_losses(p, batch):
    return jnp.sum(losses_of(hidden(p, batch), p["head"], batch["y"]), 1)


def flat(array):
    return array.reshape(B * T, *array.shape[2:])


def loss_of(p, batch, function=fused):
    return function(hidden(p, batch), p["head"], batch["y"]) / B


def flat_loss(p, batch):
    return fused(flat(hidden(p, batch)), p["head"], flat(batch["y"])) / B


def tied_loss(p, batch):
    h = hidden(p, batch) @ p["head"][:, :D]
    return fused(h, p["table"].T, batch["y"]) / B


def tied_row_losses(p, batch):
    return jnp.sum(losses_of(hidden(p, batch) @ p["head"][:, :D], p["table"].T, batch["y"]), 1)


def probe(p, batch):
    return fused(batch["x"], p["table"].T, batch["y"]) / B


def probe_row_losses(p, batch):
    return jnp.sum(losses_of(batch["x"], p["table"].T, batch["y"]), 1)


def weighted(p, batch):
    return jnp.exp(p["w"][0, 0]) * loss_of(p, batch)


CASES = {
    "positions": (loss_of, row_losses),
    "flat": (flat_loss, row_losses),
    "tied": (tied_loss, tied_row_losses),
    "frozen features": (probe, probe_row_losses),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("coupled", ["error", "share"])
def test_dots_are_those_of_rows(name, coupled):
    loss_fn, losses = CASES[name]
    direction = direction_like(P)
    directions = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), direction)

    @jax.jit
    def run(p, batch):
        early = value_grad_and_dots(loss_fn, coupled=coupled)(p, batch, direction=direction)
        late = value_and_dots_fn(loss_fn, coupled=coupled)(p, batch)[2]
        return early, late(directions)

    result, late = run(P, BATCH)
    expected = expected_dots(losses, P, BATCH, direction)
    testing.assert_dots_close(result.dots, expected)
    testing.assert_dots_close(late, jax.tree.map(lambda rows: np.stack([rows, 2 * rows]), expected))
    plain = jax.jit(jax.grad(lambda p, b: jnp.mean(losses(p, b))))(P, BATCH)
    testing.assert_dots_close(result.grads, plain)
