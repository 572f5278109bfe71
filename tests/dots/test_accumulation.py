"""A batch in parts, accumulated outside the loss: scores are those of the big batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import InRunValues, directions, testing, value_grad_and_dots
from models.arrays import direction_like, draw
from tests.dots.checks import expected_dots

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


CUTS = {
    "contiguous": lambda leaf: leaf.reshape(PARTS, SIZE, *leaf.shape[1:]),
    "every k-th": lambda leaf: jnp.stack([leaf[k::PARTS] for k in range(PARTS)]),
}


@jax.jit
def start():
    """A state of the optimizer that has moments."""
    grads = jax.grad(mean_loss)(PARAMS, {"x": X + 1})
    return TX.update(grads, TX.init(PARAMS), PARAMS)[1]


@jax.jit
def through_optimizer(grads):
    val_grads = jax.grad(mean_loss)(PARAMS, {"x": VAL})
    return directions.through_optimizer(TX, start(), PARAMS, grads, val_grads)


def expected_scores(row_losses, batch):
    """Of the big batch, by rows' own gradients: [B], shares of the update."""
    grads = testing.per_example_grads(row_losses, PARAMS, batch)
    total = jax.tree.map(lambda leaf: leaf.sum(0), grads)
    direction = through_optimizer(total)
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


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "loss"), [*itertools.product(CUTS, LOSSES)])
def test_a_scan_over_parts(cut, loss, standard_promotion):
    """The first scan accumulates the gradient, the second multiplies with the direction."""
    loss_fn, reduction, of_gradients, of_dots, rows = LOSSES[loss]
    batch = {"x": X, "mask": MASK}
    parts, ids = jax.tree.map(CUTS[cut], batch), CUTS[cut](IDS)

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optax.MultiSteps")
@pytest.mark.parametrize(("cut", "loss"), [*itertools.product(CUTS, LOSSES)])
def test_multi_steps(cut, loss, standard_promotion):
    """Parts wait for the step that updates; the direction through it is that of all of them."""
    loss_fn, reduction, of_gradients, of_dots, rows = LOSSES[loss]
    batch = {"x": X, "mask": MASK}
    parts, ids = jax.tree.map(CUTS[cut], batch), CUTS[cut](IDS)
    multi = optax.MultiSteps(TX, PARTS)
    # MultiSteps takes the mean of the parts' gradients, and a part's dots are of its own gradient.
    of_part, of_rows = of_gradients / PARTS, of_dots / PARTS

    @jax.jit
    def steps(params, state, values):
        def micro(carry, part):
            params, state = carry
            grads = jax.tree.map(lambda leaf: leaf / of_part, jax.grad(loss_fn)(params, part))
            val_grads = jax.grad(mean_loss)(params, {"x": VAL})
            direction = directions.through_optimizer(multi, state, params, grads, val_grads)
            updates, state = multi.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), direction

        (after, _), found = jax.lax.scan(micro, (params, state), parts)
        gathering = jax.tree.map(lambda leaf: leaf[:-1], found)
        direction = jax.tree.map(lambda leaf: leaf[-1], found)

        def score(values, part_and_ids):
            part, ids = part_and_ids
            fn = value_grad_and_dots(loss_fn, loss_reduction=reduction)
            scores = fn(params, part, direction=direction).total() / of_rows
            return values.add(ids, scores), None

        return jax.lax.scan(score, values, (parts, ids))[0], after, gathering

    state = multi.init(PARAMS)._replace(inner_opt_state=start())
    values, after, gathering = steps(PARAMS, state, InRunValues.zeros(20))
    expected, total = expected_scores(rows, batch)
    updates, _ = jax.jit(TX.update)(total, start(), PARAMS)
    testing.assert_dots_close(after, optax.apply_updates(PARAMS, updates))
    of_ids = np.zeros(20)
    of_ids[np.asarray(IDS)] = expected
    testing.assert_dots_close(values.of("val"), of_ids)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gathering))


@pytest.mark.parametrize("loss", LOSSES)
def test_plain_dots_of_parts(loss, standard_promotion):
    """No update is asked for: a scan over parts gives them at once."""
    loss_fn, reduction, _, of_dots, rows = LOSSES[loss]
    batch, direction = {"x": X, "mask": MASK}, direction_like(PARAMS)

    @jax.jit
    def dots(params, parts):
        def score(_, part):
            fn = value_grad_and_dots(loss_fn, loss_reduction=reduction)
            return None, fn(params, part, direction=direction).dots

        found = jax.lax.scan(score, None, parts)[1]
        return jax.tree.map(lambda leaf: leaf.reshape(B) / of_dots, found)

    found = dots(PARAMS, jax.tree.map(CUTS["contiguous"], batch))
    testing.assert_dots_close(found, expected_dots(rows, PARAMS, batch, direction))


def test_a_validation_gradient_in_parts_of_several_lengths():
    """Weighted by what each part has of the whole, it is that of all validation rows."""
    val = {"x": X, "mask": MASK}

    @jax.jit
    def direction(params):
        def add(total, part):
            found = jax.grad(summed_loss)(params, part), jnp.sum(part["mask"])
            return jax.tree.map(jnp.add, total, found), None

        nothing = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        (total, count), _ = jax.lax.scan(add, nothing, jax.tree.map(CUTS["every k-th"], val))
        return jax.tree.map(lambda leaf: leaf / count, total)

    def whole(params):
        return summed_loss(params, val) / jnp.sum(MASK)

    found, expected = direction(PARAMS), jax.jit(jax.grad(whole))(PARAMS)
    testing.assert_dots_close(found, expected)


def test_a_validation_gradient_for_several_steps():
    """Made at every second step, and kept in what the loop carries."""
    fn = value_grad_and_dots(mean_loss)
    batches = X.reshape(PARTS, SIZE, T, WIDTH)

    @jax.jit
    def fresh(params):
        return jax.grad(mean_loss)(params, {"x": VAL})

    @jax.jit
    def run(params):
        def step(carry, now):
            params, direction = carry
            number, x = now
            direction = jax.lax.cond(number % 2 == 0, fresh, lambda _: direction, params)
            result = fn(params, {"x": x}, direction=direction)
            after = jax.tree.map(lambda leaf, grad: leaf - grad / 8, params, result.grads)
            return (after, direction), (params, result.total())

        start = params, jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(step, start, (jnp.arange(PARTS), batches))[1]

    def rows(params, batch):
        return jnp.mean(token_losses(params, batch["x"]), axis=1)

    at, scores = run(PARAMS)
    for number, origin in enumerate([0, 0, 2]):
        params, made_at = (jax.tree.map(lambda leaf, k=k: leaf[k], at) for k in (number, origin))
        expected = expected_dots(rows, params, {"x": batches[number]}, fresh(made_at))
        testing.assert_dots_close(scores[number], sum(jax.tree.leaves(expected)))
