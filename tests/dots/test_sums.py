"""Parameters that multiply a mean over rows: exact dots per row, from the summands of the mean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import directions_like, draw
from tests.dots.checks import expected_stacked
from tests.variants import some_quick

B, T, F = 6, 6, 4
PARAMS = {"w": draw(F, F), "b": draw(F, seed=1), "s": jnp.float32(0.3), "u": jnp.float32(-0.7)}
BATCH = {"x": draw(B, T, F, seed=2), "mask": jnp.float32(np.arange(B * T).reshape(B, T) % 5 < 3)}


def tokens(p, batch):
    """[B, T]"""
    return jnp.sum(jnp.square(jnp.tanh(batch["x"] @ p["w"])), -1)


def others(p, batch):
    return jnp.sum(jnp.sin(batch["x"] * p["b"][None, None]), -1)


def rows(p, batch):
    """[B]"""
    return jnp.mean(tokens(p, batch), 1)


def decay(p):
    return 1 + jnp.sum(jnp.square(p["b"]))


def masked(p, batch):
    return tokens(p, batch) * batch["mask"] * (B / jnp.sum(batch["mask"]))


def in_a_loop(p, batch):
    total = 0.0
    for row in range(B):
        total += rows(p, {"x": batch["x"][row : row + 1]})[0]
    return total / B


def mean_of(losses):
    return lambda p, batch: jnp.mean(losses(p, batch))


def nothing(p):
    return 0.0 * p["s"]


# The loss; the losses of rows, whose mean it is, but for what belongs to no row.
CASES = {
    "temperature": (
        lambda p, b: jnp.exp(-p["s"]) * jnp.mean(rows(p, b)) + p["s"],
        lambda p, b: jnp.exp(-p["s"]) * rows(p, b),
        lambda p: p["s"],
    ),
    "uncertainty_of_two_tasks": (
        lambda p, b: (
            jnp.exp(-p["s"]) * jnp.mean(tokens(p, b))
            + p["s"]
            + jnp.mean(others(p, b)) / (2 * jnp.square(p["u"]))
            + jnp.log(jnp.square(p["u"]))
        ),
        lambda p, b: (
            jnp.exp(-p["s"]) * rows(p, b) + jnp.mean(others(p, b), 1) / (2 * jnp.square(p["u"]))
        ),
        lambda p: p["s"] + jnp.log(jnp.square(p["u"])),
    ),
    "uncertainty_of_stacked_tasks": (
        lambda p, b: jnp.sum(
            jnp.exp(-p["b"][:2]) * jnp.stack([jnp.mean(tokens(p, b)), jnp.mean(others(p, b))])
        ),
        lambda p, b: (
            jnp.exp(-p["b"][0]) * rows(p, b) + jnp.exp(-p["b"][1]) * jnp.mean(others(p, b), 1)
        ),
        nothing,
    ),
    "weight_decay_times_the_loss": (
        lambda p, b: jnp.mean(rows(p, b)) * decay(p),
        lambda p, b: rows(p, b) * decay(p),
        nothing,
    ),
    "nested_with_a_constant_between": (
        lambda p, b: p["u"] * (p["s"] * jnp.mean(tokens(p, b)) + p["b"][0] - 2.0),
        lambda p, b: p["u"] * p["s"] * rows(p, b),
        lambda p: p["u"] * (p["b"][0] - 2.0),
    ),
    "two_means_before_the_parameter": (
        lambda p, b: p["s"] * (jnp.mean(rows(p, b)) - 3 * jnp.mean(others(p, b))),
        lambda p, b: p["s"] * (rows(p, b) - 3 * jnp.mean(others(p, b), 1)),
        nothing,
    ),
    "means_over_rows_first": (
        lambda p, b: jnp.sum(p["w"][0][:, None] * jnp.mean(b["x"] @ p["w"], 0).T),
        lambda p, b: jnp.einsum("f,btf->b", p["w"][0], b["x"] @ p["w"]),
        nothing,
    ),
    "a_layer_behind_the_mean": (
        lambda p, b: jnp.sum(
            jnp.mean(tokens(p, b)[..., None] * p["b"][None, None], (0, 1)) @ p["w"] + p["b"]
        ),
        lambda p, b: jnp.sum((jnp.mean(tokens(p, b), 1)[:, None] * p["b"][None]) @ p["w"], 1),
        lambda p: jnp.sum(p["b"]),
    ),
    "masked_mean": (
        lambda p, b: (
            p["s"] * jnp.sum(tokens(p, b) * b["mask"]) / jnp.maximum(jnp.sum(b["mask"]), 1)
        ),
        lambda p, b: p["s"] * jnp.sum(masked(p, b), 1),
        nothing,
    ),
    "weights_in_a_product": (
        lambda p, b: p["s"] * jnp.vdot(rows(p, b), jnp.arange(6.0) / B),
        lambda p, b: p["s"] * rows(p, b) * jnp.arange(6.0),
        nothing,
    ),
    "shuffled": (
        lambda p, b: p["s"] * jnp.mean(rows(p, b)[jnp.argsort(b["x"][:, 0, 0])]),
        lambda p, b: p["s"] * rows(p, b),
        nothing,
    ),
    "jitted_and_rematerialised": (
        jax.checkpoint(lambda p, b: p["s"] * jax.jit(mean_of(rows))(p, b)),
        lambda p, b: p["s"] * rows(p, b),
        nothing,
    ),
    "a_jitted_mean": (
        lambda p, b: p["s"] * jax.jit(jnp.mean)(rows(p, b)),
        lambda p, b: p["s"] * rows(p, b),
        nothing,
    ),
    "a_loop_over_rows": (
        lambda p, b: p["s"] * in_a_loop(p, b),
        lambda p, b: p["s"] * rows(p, b),
        nothing,
    ),
    "twice_in_a_scan": (
        lambda p, b: jax.lax.scan(
            lambda total, w: (total + p["s"] * jnp.mean(jnp.sin(b["x"] @ w)), None),
            0.0,
            jnp.stack([p["w"], p["w"].T]),
        )[0],
        lambda p, b: sum(
            p["s"] * jnp.mean(jnp.sin(b["x"] @ w), (1, 2)) for w in (p["w"], p["w"].T)
        ),
        nothing,
    ),
}


# Like others, which are quick.
SLOW = {
    "uncertainty_of_two_tasks", "weight_decay_times_the_loss", "two_means_before_the_parameter",
    "shuffled", "a_jitted_mean",
}  # fmt: skip


@pytest.mark.quick(
    "a_layer_behind_the_mean",
    "jitted_and_rematerialised",
    "nested_with_a_constant_between",
    "masked_mean",
    "weights_in_a_product",
    "a_loop_over_rows",
)
@pytest.mark.parametrize("name", some_quick(CASES, lambda name: name not in SLOW))
def test_a_parameter_times_a_mean(name):
    loss_fn, row_losses, rest = CASES[name]
    directions = directions_like(PARAMS)
    first = jax.tree.map(lambda leaf: leaf[0], directions)
    late = value_and_dots_fn(loss_fn)

    @jax.jit
    def run(params, batch, first, directions):
        early = value_grad_and_dots(loss_fn)(params, batch, direction=first)
        return early, late(params, batch)[2].result(directions)

    early, several = run(PARAMS, BATCH, first, directions)
    expected = expected_stacked(row_losses, PARAMS, BATCH, directions)
    testing.assert_dots_close(early.dots, jax.tree.map(lambda leaf: leaf[0], expected))
    testing.assert_dots_close(several.dots, expected)
    of_nobody = jax.tree.map(jnp.vdot, jax.grad(rest)(PARAMS), first)
    testing.assert_dots_close(early.shared, of_nobody, rtol=1e-5)
    plain = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, BATCH)
    chex.assert_trees_all_equal((early.value, early.grads), plain)
    for result, vectors in ((early, first), (several, directions)):
        errors = conservation_error(result, vectors)
        assert max(np.max(leaf) for leaf in jax.tree.leaves(errors)) <= 1e-5


@pytest.mark.parametrize("shape", [(B,), (B, T)], ids=["rows", "positions"])
def test_a_temperature_with_labels(shape):
    ids = np.random.default_rng(3).integers(-1, 4, size=shape)
    own = {"labels": ids, "num_labels": 4}
    direction = jax.tree.map(lambda leaf: leaf[0], directions_like(PARAMS))

    def loss_fn(p, batch):
        return jnp.exp(-p["s"]) * jnp.sum(tokens(p, batch))

    def places(p, batch):
        losses = jnp.exp(-p["s"]) * tokens(p, batch)
        return losses.ravel() if len(shape) == 2 else jnp.sum(losses, 1)

    fn = jax.jit(
        lambda p, b: value_grad_and_dots(loss_fn, loss_reduction="sum")(
            p, b, direction=direction, **own
        )
    )
    result = fn(PARAMS, BATCH)
    stacked = jax.tree.map(lambda leaf: leaf[None], direction)
    by_place = expected_stacked(places, PARAMS, BATCH, stacked)
    expected = jax.tree.map(
        lambda leaf: np.stack([leaf[0][ids.ravel() == k].sum() for k in range(4)]), by_place
    )
    testing.assert_dots_close(result.dots, expected)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, b: p["s"] * jnp.sqrt(jnp.mean(rows(p, b))),
        lambda p, b: p["s"] * (jnp.mean(rows(p, b)) * jnp.mean(others(p, b))),
        lambda p, b: p["s"] / jnp.mean(rows(p, b)),
    ],
    ids=["root", "product_of_means", "quotient"],
)
def test_what_is_not_linear_in_the_mean_is_an_error(loss_fn):
    with pytest.raises(ValueError, match=r"parameter \['s'\] meets data in \w+ at .*test_sums"):
        value_grad_and_dots(loss_fn)(PARAMS, BATCH, direction=PARAMS)


def accumulated(p, batch, factor):
    def add(total, x):
        return total + factor * rows(p, {"x": x[None]})[0] / B, None

    return jax.lax.scan(add, 0.0, batch["x"])[0]


def test_a_factor_of_an_accumulated_loss_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="Make it a factor of every row's loss, before rows are"):
        value_grad_and_dots(lambda p, b: jnp.exp(p["s"]) * accumulated(p, b, 1.0))(
            PARAMS, BATCH, direction=PARAMS
        )
    directions = directions_like(PARAMS)
    fn = value_grad_and_dots(lambda p, b: accumulated(p, b, jnp.exp(p["s"])))
    result = jax.jit(lambda p, b: fn(p, b, direction=directions))(PARAMS, BATCH)
    expected = expected_stacked(
        lambda p, b: jnp.exp(p["s"]) * rows(p, b), PARAMS, BATCH, directions
    )
    testing.assert_dots_close(result.dots, expected)
