"""Audits, of right dots and of errors made on purpose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import fidelity, value_grad_and_dots
from models.arrays import direction_like, mean_squares
from tests.dots.checks import DENSE, X, dense


def loss_fn(params, x):
    return jnp.mean(mean_squares(dense(params, x)))


def test_an_audit_finds_a_row_that_is_wrong():
    direction = direction_like(DENSE)
    dots = value_grad_and_dots(loss_fn)(DENSE, X, direction=direction).total()
    audit = jax.jit(
        lambda dots, rows: fidelity.audit(
            loss_fn, DENSE, X, direction=direction, dots=dots, rows=rows
        )
    )
    assert audit(dots, jnp.array([0, 3])) < 1e-5
    wrong = dots.at[3].add(0.1 * jnp.abs(dots).max())
    assert audit(wrong, jnp.array([0, 3])) > 0.05
    assert audit(wrong, jnp.array([0, 1])) < 1e-5


MASKS = {
    "some": [[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "without a row": [[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "one row": [[0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
}
WORDS = {  # losses of sequences: (how rows are averaged, mask, weight decay)
    "mean": (None, "some", 0),
    "decay": (None, "some", 0.1),
    "mask": ("mask", "some", 0),
    "mask, decay": ("mask", "some", 0.1),
    "mask without a row, decay": ("mask", "without a row", 0.1),
    "clamped mask without a row, decay": ("clamped", "without a row", 0.1),
    "mask of one row": ("mask", "one row", 0),
    "clamped mask of one row": ("clamped", "one row", 0),
}


def words(name, dtype):
    """Loss, parameters, batch, weights of the rows, direction, and what ghostjax finds."""
    average, mask, decay = WORDS[name]
    generator = np.random.default_rng(4)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), dtype)

    params = {"embed": normal(7, 6), "out": normal(6, 7)}
    ids = jnp.asarray(generator.integers(0, 7, (5, 5)))
    batch = {"ids": ids, "mask": jnp.array(MASKS[mask], jnp.float32)}
    direction = {"embed": normal(7, 6), "out": normal(6, 7)}

    def loss(params, batch):
        ids, mask = batch["ids"], batch["mask"]
        logits = jnp.tanh(params["embed"][ids[:, :-1]]) @ params["out"]
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        losses = -jnp.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]
        rest = decay * sum(
            jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params)
        )
        if average is None:
            return jnp.mean(losses) + rest
        total = jnp.sum(mask)
        total = jnp.maximum(total, 1) if average == "clamped" else total
        return jnp.sum(losses * mask) / total + rest

    fn = value_grad_and_dots(loss)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
    by_row = batch["mask"].sum(1) if average else jnp.ones(5)
    return loss, params, batch, 5 * by_row / by_row.sum(), direction, result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(WORDS, [jnp.float32, jnp.bfloat16])]
)
def test_audits_of_masks_and_weight_decay(name, dtype):
    loss, params, batch, weights, direction, result = words(name, dtype)
    dots, rows, tolerance = result.total(), jnp.array([0, 1, 4]), 1e-5
    if dtype == jnp.bfloat16:
        tolerance = 1e-2  # the gradients are of bfloat16

    @jax.jit
    def audits(dots):
        """With everything left to be found out, and with everything told."""

        def audit(**told):
            return fidelity.audit(
                loss, params, batch, direction=direction, dots=dots, rows=rows, **told
            )

        return jnp.stack([audit(), audit(shared=result.shared, row_weights=weights)])

    assert (audits(dots) < tolerance).all()
    size = jnp.abs(dots).max()
    assert (audits(dots.at[1].add(0.1 * size)) > 0.06).all()
    assert (audits(1.5 * dots) > 0.06).all()
    one_missing = dots - result.dots["embed"]
    assert (audits(one_missing) > 0.06).all()
    own_loss = jnp.where(weights > 0, dots / weights, 0)
    if not jnp.allclose(weights, 1):
        assert (audits(own_loss) > 0.06).all()
    # All rows alike: a term that belongs to no row, unless that is told.
    assert audits(dots + 0.1 * size)[1] > 0.06


def audited(loss, params, batch, **told):
    return jax.jit(lambda params, batch, told: fidelity.audit(loss, params, batch, **told))(
        params, batch, told
    )


@pytest.mark.slow
def test_dots_that_hold_the_weight_decay_are_wrong_where_it_is_told():
    loss, params, batch, _, direction, result = words("decay", jnp.float32)
    share = sum(jax.tree.leaves(result.shared))
    told = {"direction": direction, "rows": jnp.arange(5), "shared": result.shared}
    assert audited(loss, params, batch, dots=result.total(), **told) < 1e-5
    assert audited(loss, params, batch, dots=result.total() + share, **told) > 0.1


@pytest.mark.quick("1")
@pytest.mark.parametrize("count", [1, 2])
def test_audits_of_few_rows(count):
    direction = direction_like(DENSE)
    result = jax.jit(value_grad_and_dots(loss_fn))(DENSE, X[:count], direction=direction)
    dots, rows = result.total(), jnp.arange(count)
    for told in ({}, {"shared": result.shared}, {"row_weights": jnp.ones(count)}):
        told = {"direction": direction, "rows": rows, **told}
        assert audited(loss_fn, DENSE, X[:count], dots=dots, **told) < 1e-5
        assert audited(loss_fn, DENSE, X[:count], dots=1.1 * dots, **told) > 0.01


def test_rows_with_one_gradient_have_one_weight():
    x = jnp.stack([X[0]] * 4)
    direction = direction_like(DENSE)

    def loss(params, x):
        return loss_fn(params, x) + 0.1 * jnp.sum(jnp.square(params["w"]))

    dots = jax.jit(value_grad_and_dots(loss))(DENSE, x, direction=direction).total()
    told = {"direction": direction, "rows": jnp.array([1, 3])}
    assert audited(loss, DENSE, x, dots=dots, **told) < 1e-5
    assert audited(loss, DENSE, x, dots=dots.at[1].multiply(1.1), **told) > 0.05


def test_gradients_with_squares_of_zero():
    direction = direction_like(DENSE)
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 5.0, 3.0])

    def loss(params, batch):
        x, weights = batch
        losses = 1e-25 * mean_squares(dense(params, x))
        return jnp.sum(weights * losses) / jnp.sum(weights)

    batch = X, weights
    dots = jax.jit(value_grad_and_dots(loss))(DENSE, batch, direction=direction).total()
    told = {"direction": direction, "rows": jnp.arange(6)}
    assert audited(loss, DENSE, batch, dots=dots, **told) < 1e-5
    assert audited(loss, DENSE, batch, dots=dots.at[4].multiply(1.1), **told) > 0.05


@pytest.mark.parametrize("told", [False, True])
def test_audits_of_a_sum_over_rows(told):
    def loss(params, x):
        rest = jnp.sum(jnp.square(params["w"])) if told else 0
        return jnp.sum(mean_squares(dense(params, x))) + rest

    direction = direction_like(DENSE)
    result = jax.jit(value_grad_and_dots(loss, loss_reduction="sum"))(DENSE, X, direction=direction)
    more = {"shared": result.shared, "row_weights": jnp.ones(6)} if told else {}
    more |= {"direction": direction, "rows": jnp.array([0, 5])}
    assert audited(loss, DENSE, X, dots=result.total(), **more) < 1e-5
    assert audited(loss, DENSE, X, dots=1.2 * result.total(), **more) > 0.05


def test_keys_can_be_in_the_batch():
    def loss(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(batch["key"])
        return loss_fn(params, batch["x"] + noise)

    batch = {"x": X, "key": jax.random.split(jax.random.key(0), 6)}
    direction = direction_like(DENSE)
    dots = jax.jit(value_grad_and_dots(loss))(DENSE, batch, direction=direction).total()
    error = audited(loss, DENSE, batch, direction=direction, dots=dots, rows=jnp.array([2, 3]))
    assert error < 1e-5


def test_an_audit_of_what_is_not_finite_fails():
    """NaN would be below every tolerance."""
    x = jnp.array([[1.0, 0.0], [jnp.inf, 2.0]])
    error = fidelity.audit(
        lambda w, x: jnp.mean((x @ w) ** 2),
        jnp.ones(2),
        x,
        direction=jnp.ones(2),
        dots=jnp.array([4.0, 36.0]),
        rows=jnp.array([1]),
    )
    assert error == np.inf
