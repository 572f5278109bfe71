"""A batch in parts, accumulated outside the loss: scores are those of the big batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import InRunValues, directions, testing, value_grad_and_dots
from tests.dots.checks import draw

PARTS, SIZE, T, WIDTH = 3, 4, 5, 6
B = PARTS * SIZE
PARAMS = {"first": draw(WIDTH, 8) / 2, "bias": draw(8), "second": draw(8, WIDTH) / 2}
X, VAL = draw(B, T, WIDTH, seed=1), draw(4, T, WIDTH, seed=2)
IDS = jnp.asarray(np.random.default_rng(3).permutation(20)[:B], jnp.int32)
LENGTHS = jnp.asarray(np.random.default_rng(4).integers(1, T + 1, B), jnp.int32)
MASK = (jnp.arange(T)[None] < LENGTHS[:, None]).astype(jnp.float32)
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))


def token_losses(params, x):
    """[B, T]"""
    h = jnp.tanh(x @ params["first"] + params["bias"][None, None]) @ params["second"]
    return jnp.mean(jnp.square(h - x), axis=-1)


def mean_loss(params, batch):
    return jnp.mean(token_losses(params, batch["x"]))


def summed_loss(params, batch):
    return jnp.sum(token_losses(params, batch["x"]) * batch["mask"])


CONTIGUOUS = ("contiguous", lambda leaf: leaf.reshape(PARTS, SIZE, *leaf.shape[1:]))
STRIDED = (
    "every k-th",
    lambda leaf: jnp.stack([leaf[k::PARTS] for k in range(PARTS)]),
)


def start():
    """A state of the optimizer that has moments."""
    grads = jax.grad(mean_loss)(PARAMS, {"x": X + 1})
    return TX.update(grads, TX.init(PARAMS), PARAMS)[1]


def expected_scores(row_losses, batch):
    """Of the big batch, by rows' own gradients: [B], shares of the update."""
    grads = testing.per_example_grads(row_losses, PARAMS, batch)
    total = jax.tree.map(lambda leaf: leaf.sum(0), grads)
    val_grads = jax.grad(mean_loss)(PARAMS, {"x": VAL})
    direction = directions.through_optimizer(TX, start(), PARAMS, total, val_grads)
    products = jax.tree.map(
        lambda rows, vector: np.tensordot(
            np.asarray(rows, np.float64), np.asarray(vector, np.float64), axes=vector.ndim
        ),
        grads,
        direction,
    )
    return sum(jax.tree.leaves(products)), total


def mean_rows(params, batch):
    return jnp.mean(token_losses(params, batch["x"]), axis=1) / B


def token_rows(params, batch):
    return jnp.sum(token_losses(params, batch["x"]) * batch["mask"], axis=1) / jnp.sum(MASK)


# loss of a part, its reduction, and what the sum of the parts' gradients and dots is divided by
LOSSES = {
    "mean of rows": (mean_loss, "mean", PARTS, B, mean_rows),
    "mean of tokens": (summed_loss, "sum", jnp.sum(MASK), jnp.sum(MASK), token_rows),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cut", [CONTIGUOUS, STRIDED], ids=lambda cut: cut[0])
def test_a_scan_over_parts(cut, loss, standard_promotion):
    """The first scan accumulates the gradient, the second multiplies with the direction."""
    loss_fn, reduction, of_gradients, of_dots, rows = LOSSES[loss]
    batch = {"x": X, "mask": MASK}
    parts, ids = jax.tree.map(cut[1], batch), cut[1](IDS)

    @jax.jit
    def step(params, values):
        def add(total, part):
            grads = jax.grad(loss_fn)(params, part)
            return jax.tree.map(jnp.add, total, grads), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        grads = jax.tree.map(lambda leaf: leaf / of_gradients, total)
        val_grads = jax.grad(mean_loss)(params, {"x": VAL})
        direction = directions.through_optimizer(TX, start(), params, grads, val_grads)

        def score(values, part_and_ids):
            part, ids = part_and_ids
            fn = value_grad_and_dots(loss_fn, loss_reduction=reduction)
            scores = fn(params, part, direction=direction).total() / of_dots
            return values.add(ids, scores), None

        return jax.lax.scan(score, values, (parts, ids))[0], grads

    values, grads = step(PARAMS, InRunValues.zeros(20))
    expected, total = expected_scores(rows, batch)
    testing.assert_dots_close(grads, total, rtol=1e-5)
    of_ids = np.zeros(20)
    of_ids[np.asarray(IDS)] = expected
    testing.assert_dots_close(values.of("val"), of_ids)
