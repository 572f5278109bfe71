"""Losses whose ``custom_vjp`` sums over rows itself, with the head's weights inside."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ghostjax import (
    pairwise_dots,
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_and_dots_fn,
    value_grad_and_dots,
)
from ghostjax._errors import RowAxisError
from models.arrays import direction_like, draw
from tests.dots.checks import expected_dots, one_by_one

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


@pytest.mark.quick("frozen features-share")
@pytest.mark.parametrize(("name", "coupled"), [*itertools.product(CASES, ["error", "share"])])
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


@jax.custom_vjp
def weighted_sum(h, weights, head, y):
    """Of two operands with gradient."""
    return jnp.sum(losses_of(h, head, y) * weights)


def weighted_rule(kept, c):
    h, weights, head, y = kept
    d = (jax.nn.softmax(h @ head) - jax.nn.one_hot(y, V)) * (weights * c)[..., None]
    to_h, to_head, _ = gradients(h, head, d)
    return to_h, losses_of(h, head, y) * c, to_head, None


weighted_sum.defvjp(lambda *args: (weighted_sum(*args), args), weighted_rule)


@pytest.mark.parametrize("is_head_trained", [True, False])
def test_several_operands_with_gradient(is_head_trained):
    def head_of(p):
        return p["head"] if is_head_trained else P["head"]

    def loss_fn(p, batch, order=slice(None)):
        h = hidden(p, batch)
        return weighted_sum(h, jnp.sin(h[..., 0])[order], head_of(p), batch["y"]) / B

    def losses(p, batch):
        h = hidden(p, batch)
        return jnp.sum(losses_of(h, head_of(p), batch["y"]) * jnp.sin(h[..., 0]), 1)

    direction = direction_like(P)

    @jax.jit
    def run(p, batch):
        late = value_and_dots_fn(loss_fn)(p, batch)[2](direction)
        mixed = functools.partial(loss_fn, order=jnp.argsort(batch["x"][:, 0, 0]))
        found = [value_grad_and_dots(fn)(p, batch, direction=direction) for fn in (loss_fn, mixed)]
        return *found, late

    result, mixed, late = run(P, BATCH)
    expected = expected_dots(losses, P, BATCH, direction)
    testing.assert_dots_close(result.dots, expected)
    testing.assert_dots_close(late, expected)
    assert int(mixed.conflicts) > 0
    assert bool(jnp.isnan(mixed.total()).all())


LABELS = jnp.array([[0, 0, 2], [2, 1, -1], [1, 1, 1], [0, 2, 2]])


def place_losses(p, batch):
    return losses_of(hidden(p, batch), p["head"], batch["y"])


@pytest.mark.slow
def test_packed_documents_and_groups_of_rows():
    direction = direction_like(P)
    groups = jnp.array([1, 0, 1, -1])

    @jax.jit
    def run(p, batch):
        fn = value_grad_and_dots(flat_loss)
        of_documents = fn(p, batch, direction=direction, labels=LABELS, num_labels=3)
        of_groups = fn(p, batch, direction=direction, labels=groups, num_labels=2)
        late = value_and_dots_fn(flat_loss)(p, batch, labels=LABELS, num_labels=3)[2]
        return of_documents, of_groups, late(direction)

    of_documents, of_groups, late = run(P, BATCH)
    places = {key: flat(array)[:, None] for key, array in BATCH.items()}
    each = expected_dots(lambda p, b: place_losses(p, b)[:, 0], P, places, direction)
    ids, of_rows = np.ravel(LABELS), jax.tree.map(lambda dots: dots.reshape(B, T).sum(1), each)

    def added(dots, ids, count):
        return jax.tree.map(lambda d: np.array([d[ids == k].sum() for k in range(count)]), dots)

    expected = added(each, ids, 3)
    for found in (of_documents.dots, late):
        testing.assert_dots_close(found, expected)
    testing.assert_dots_close(of_groups.dots, added(of_rows, np.asarray(groups), 2))
    assert int(of_documents.conflicts) == 0


@pytest.mark.slow
def test_norms_clipping_and_pairs():
    @jax.jit
    def run(p, batch):
        norms = squared_norms(loss_of)(p, batch)
        _, clipped = value_and_clipped_grad(loss_of, 1.0)(p, batch)
        return norms, clipped, pairwise_dots(loss_of, val_batch_size=2)(p, batch)

    norms, clipped, pairs = run(P, BATCH)
    grads = testing.per_example_grads(row_losses, P, BATCH)
    flattened = jax.tree.map(lambda g: np.asarray(g, np.float64).reshape(B, -1), grads)
    testing.assert_dots_close(norms, jax.tree.map(lambda g: (g**2).sum(1), flattened))
    testing.assert_dots_close(pairs, jax.tree.map(lambda g: g[:2] @ g[2:].T, flattened))
    sizes = np.sqrt(sum(jax.tree.leaves(jax.tree.map(lambda g: (g**2).sum(1), flattened))))
    factors = np.minimum(1, 1 / sizes)
    testing.assert_dots_close(
        clipped, jax.tree.map(lambda g: np.tensordot(factors, np.asarray(g), 1) / B, grads)
    )


def test_bfloat16():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), P)
    batch = {**BATCH, "x": BATCH["x"].astype(jnp.bfloat16)}
    direction = direction_like(params)
    run = jax.jit(lambda p, b: value_grad_and_dots(loss_of)(p, b, direction=direction))
    result = run(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype("float32")}
    expected = expected_dots(row_losses, params, batch, direction)
    testing.assert_dots_close(result.dots, expected, rtol=2e-2)


MIXING = {
    "centred": (
        lambda h, head, d: gradients(h, head, d - d.mean(0, keepdims=True)),
        "combines rows with a value in which rows are mixed",
    ),
    "clipped in all": (
        lambda h, head, d: gradients(h, head, d / jnp.linalg.norm(d)),
        "combines rows with a value in which rows are mixed",
    ),
    "rounded after the sum": (
        lambda h, head, d: (d @ head.T, jnp.round(jnp.einsum("...f,...v->fv", h, d)), None),
        "must be a sum over rows, or linear in such sums. Found round",
    ),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("coupled", ["error", "share"])
def test_rules_that_mix_rows_are_refused(name, coupled):
    backward, message = MIXING[name]

    def loss_fn(p, batch):
        return loss_of(p, batch, fused_with(backward))

    fn = value_grad_and_dots(loss_fn, coupled=coupled)
    with pytest.raises(RowAxisError, match=message) as refused:
        jax.eval_shape(fn, P, BATCH, direction=P)
    assert ("a parameter has no share" in str(refused.value)) == (coupled == "share")


def test_the_way_out_of_a_refused_rule():
    """The loss of one row with ``per_example=True`` takes any rule."""
    function = fused_with(MIXING["rounded after the sum"][0])

    def of_one(p, row):
        batch = jax.tree.map(lambda leaf: leaf[None], row)
        return function(hidden(p, batch), p["head"], batch["y"])

    direction = direction_like(P)
    fn = value_grad_and_dots(of_one, per_example=True, loss_reduction="sum")
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(P, BATCH, direction)
    expected = one_by_one(
        lambda p, b: function(hidden(p, b), p["head"], b["y"])[None], P, BATCH, direction
    )
    testing.assert_dots_close(result.dots, expected)


def of_activations(backward):
    @jax.custom_vjp
    def function(h):
        return jnp.sum(jnp.sin(h))

    function.defvjp(lambda h: (function(h), h), lambda h, c: (backward(jnp.cos(h) * c),))
    return lambda p, batch: function(hidden(p, batch)) / B


@pytest.mark.slow
def test_rules_of_activations_alone_that_mix_rows():
    """Their dots were rows' shares, without a word."""
    fn = value_grad_and_dots(of_activations(lambda d: d - d.mean(0, keepdims=True)))
    with pytest.raises(RowAxisError, match="combines rows with a value in which rows are mixed"):
        jax.eval_shape(fn, P, BATCH, direction=P)
    result = value_grad_and_dots(of_activations(lambda d: d[::-1]))(P, BATCH, direction=P)
    assert int(result.conflicts) > 0
    assert bool(jnp.isnan(result.total()).all())


@pytest.mark.parametrize("tiles", [2, 6])
def test_rules_of_activations_alone_in_chunks(tiles):
    def in_chunks(d):
        _, back = jax.lax.scan(lambda total, x: (total, 3 * x), 0.0, d.reshape(tiles, -1, F))
        return back.reshape(d.shape)

    direction = direction_like(P)
    fn = jax.jit(value_grad_and_dots(of_activations(in_chunks)))
    result = fn(P, BATCH, direction=direction)
    expected = expected_dots(
        lambda p, b: 3 * jnp.sum(jnp.sin(hidden(p, b)), (1, 2)), P, BATCH, direction
    )
    testing.assert_dots_close(result.dots, expected)


def test_one_row_on_each_device():
    mesh = jax.make_mesh((B,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:B])
    loss_fn = jax.shard_map(
        lambda p, b: jax.lax.psum(loss_of(p, b), "data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    direction = direction_like(P)
    fn = value_grad_and_dots(loss_fn)
    result = jax.jit(lambda p, b: fn(p, b, direction=direction))(P, BATCH)
    testing.assert_dots_close(result.dots, expected_dots(row_losses, P, BATCH, direction))


def with_a_write(logits, y, c):
    """The gradient of the cross-entropy, as it is written by hand."""
    rows, positions = jnp.arange(len(y))[:, None], jnp.arange(T)[None]
    return jax.nn.softmax(logits).at[rows, positions, y].add(-1) * c


def test_a_rule_that_writes_at_the_places_of_labels():
    of_logits = jax.custom_vjp(lambda z, y: jnp.sum(losses_of(z, jnp.eye(V), y)))
    of_rows = jax.custom_vjp(lambda z, y: jnp.sum(losses_of(z, jnp.eye(V), y), 1))
    of_logits.defvjp(lambda *a: (of_logits(*a), a), lambda a, c: (with_a_write(*a, c), None))
    of_rows.defvjp(
        lambda *a: (of_rows(*a), a), lambda a, c: (with_a_write(*a, c[:, None, None]), None)
    )

    @jax.custom_vjp
    def with_head(h, head, y):
        return jnp.sum(losses_of(h, head, y))

    with_head.defvjp(
        lambda *a: (with_head(*a), a),
        lambda a, c: gradients(a[0], a[1], with_a_write(a[0] @ a[1], a[2], c)),
    )
    direction = direction_like(P)
    expected = expected_dots(row_losses, P, BATCH, direction)
    for loss_fn in (
        lambda p, b: of_logits(hidden(p, b) @ p["head"], b["y"]) / B,
        lambda p, b: jnp.mean(of_rows(hidden(p, b) @ p["head"], b["y"])),
        lambda p, b: loss_of(p, b, with_head),
    ):
        fn = value_grad_and_dots(loss_fn)
        result = jax.jit(lambda p, b, fn=fn: fn(p, b, direction=direction))(P, BATCH)
        testing.assert_dots_close(result.dots, expected)
