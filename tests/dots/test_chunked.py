"""Losses whose ``custom_vjp`` sums over rows in chunks, with the head's weights inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import (
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_and_dots_fn,
    value_grad_and_dots,
)
from ghostjax._errors import RowAxisError
from models.arrays import direction_like, draw
from tests.dots.checks import check_loss, expected_dots, one_by_one
from tests.variants import crossed, some_quick

B, T, D, F, V = 4, 6, 5, 6, 7
P = {"w": draw(D, F, seed=1), "norm": draw(F, seed=8), "head": draw(F, V, seed=2)}
BATCH = {
    "x": draw(B, T, D, seed=4),
    "y": jnp.asarray(np.random.default_rng(5).integers(0, V, (B, T))),
    "mask": jnp.asarray(np.random.default_rng(6).integers(0, 2, (B, T))),
}


def losses_of(own, h, y, mask):
    norm, head = own
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6)
    h = h * jnp.expand_dims(norm, range(h.ndim - 1))
    logits = (h @ head).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen) * mask.astype(jnp.float32)


def loss_of_chunk(own, h, y, mask):
    return jnp.sum(losses_of(own, h, y, mask))


def gradients(own, h, y, mask):
    _, pull = jax.vjp(lambda own, h: loss_of_chunk(own, h, y, mask), own, h)
    return pull(jnp.ones(()))


def in_tiles(tiles, *arrays):
    return tuple(a.reshape(tiles, -1, *a.shape[2:]) for a in arrays)


def scan_of(one, tiles, own, h, *others):
    """Gradients of chunks, those of the weights added up."""

    def body(total, chunk):
        of_own, of_h = one(own, *chunk)
        return jax.tree.map(jnp.add, total, of_own), of_h

    start = jax.tree.map(jnp.zeros_like, own)
    total, of_h = jax.lax.scan(body, start, in_tiles(tiles, h, *others))
    return total, of_h.reshape(h.shape)


def scaled(c, of_own, of_h):
    return jax.tree.map(lambda leaf: leaf * c.astype(leaf.dtype), (of_own, of_h))


def tiled(tiles, one=gradients):
    """The rule makes gradients chunk by chunk, as MaxText's vocabulary tiling does."""

    @jax.custom_vjp
    def fused(own, h, y, mask):
        def body(total, chunk):
            return total + loss_of_chunk(own, *chunk), None

        return jax.lax.scan(body, jnp.zeros(()), in_tiles(tiles, h, y, mask))[0]

    def rule(kept, c):
        return *scaled(c, *scan_of(one, tiles, *kept)), None, None

    fused.defvjp(lambda *args: (fused(*args), args), rule)
    return fused


def made_before(tiles):
    """The forward pass makes the gradients, as Liger's fused cross-entropy does."""

    def forward(own, h, y, mask):
        made = scan_of(gradients, tiles, own, h, y, mask)
        return loss_of_chunk(own, h, y, mask), made

    fused = jax.custom_vjp(lambda *args: forward(*args)[0])
    fused.defvjp(forward, lambda made, c: (*scaled(c, *made), None, None))
    return fused


def sliced(tiles):
    """Chunks are taken out of the arrays, and written into one of gradients."""

    @jax.custom_vjp
    def fused(own, h, y, mask):
        return loss_of_chunk(own, h, y, mask)

    def rule(kept, c):
        own, *arrays = kept
        size = B * T // tiles
        flat = [a.reshape(B * T, *a.shape[2:]) for a in arrays]

        def body(number, carry):
            total, written = carry
            chunk = [jax.lax.dynamic_slice_in_dim(a, number * size, size) for a in flat]
            of_own, of_h = gradients(own, *chunk)
            written = jax.lax.dynamic_update_slice_in_dim(written, of_h, number * size, 0)
            return jax.tree.map(jnp.add, total, of_own), written

        start = jax.tree.map(jnp.zeros_like, own), jnp.zeros_like(flat[0])
        total, written = jax.lax.fori_loop(0, tiles, body, start)
        return *scaled(c, total, written.reshape(arrays[0].shape)), None, None

    fused.defvjp(lambda *args: (fused(*args), args), rule)
    return fused


def of_mean(cast):
    """The mean over what is no padding: their number is a constant."""

    @jax.custom_vjp
    def fused(own, h, y, mask):
        return loss_of_chunk(own, h, y, mask) / cast(mask).astype(jnp.float32)

    def rule(kept, c):
        count = cast(kept[3])

        def one(*args):
            return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), gradients(*args))

        return *scaled(c, *scan_of(one, 3, *kept)), None, None

    fused.defvjp(lambda *args: (fused(*args), args), rule)
    return fused


def hidden(p, batch):
    return jnp.tanh(batch["x"] @ p["w"])


def row_losses(p, batch):
    return jnp.sum(
        losses_of((p["norm"], p["head"]), hidden(p, batch), batch["y"], batch["mask"]), 1
    )


def loss_with(fused, scale=1 / B):
    def loss_fn(p, batch):
        own = p["norm"], p["head"]
        return scale * fused(own, hidden(p, batch), batch["y"], batch["mask"])

    return loss_fn


def shuffled(p, batch):
    order = jnp.array([2, 0, 3, 1])
    return loss_with(tiled(3))(p, jax.tree.map(lambda leaf: leaf[order], batch))


def micro_batches(p, batch):
    def body(total, part):
        return total + jax.checkpoint(loss_with(tiled(4)))(p, part), None

    parts = jax.tree.map(lambda leaf: leaf.reshape(2, B // 2, *leaf.shape[1:]), batch)
    return jax.lax.scan(body, 0.0, parts)[0]


# Chunks of all rows, of several and of parts, of one row, of half a row and of one position.
TILES = (1, 3, 4, 8, 24)
CASES = {
    **{f"tiled {tiles}": loss_with(tiled(tiles)) for tiles in TILES},
    **{f"made before {tiles}": loss_with(made_before(tiles)) for tiles in (3, 4)},
    "sliced": loss_with(sliced(3)),
    "integers counted": loss_with(of_mean(jnp.sum), int(BATCH["mask"].sum()) / B),
    "floats counted": loss_with(
        of_mean(lambda mask: jnp.sum(mask.astype(jnp.float32))), int(BATCH["mask"].sum()) / B
    ),
    "shuffled": shuffled,
    "micro-batches": micro_batches,
}


# Tiles alone are in the tests below.
FEW = ["floats counted"]


@pytest.mark.parametrize("name", some_quick(CASES, FEW))
def test_dots_are_those_of_rows(name):
    check_loss(CASES[name], row_losses, P, BATCH, exact_gradient=False)


def test_rows_that_may_be_coupled():
    direction = direction_like(P)
    fn = value_grad_and_dots(loss_with(tiled(3)), coupled="share")
    result = jax.jit(lambda p, b: fn(p, b, direction=direction))(P, BATCH)
    testing.assert_dots_close(result.dots, expected_dots(row_losses, P, BATCH, direction))


LABELS = jnp.asarray(np.random.default_rng(3).integers(-1, 5, (B, T)))


@pytest.mark.parametrize("tiles", [pytest.param(3, marks=pytest.mark.slow), 24])
def test_packed_documents(tiles):
    direction = direction_like(P)
    loss_fn = loss_with(tiled(tiles), 1)

    @jax.jit
    def run(p, batch):
        labels = {"labels": LABELS, "num_labels": 5}
        early = value_grad_and_dots(loss_fn, loss_reduction="sum")
        late = value_and_dots_fn(loss_fn, loss_reduction="sum")(p, batch, **labels)[2]
        return early(p, batch, direction=direction, **labels), late.result(direction)

    places = jax.tree.map(lambda leaf: leaf.reshape(B * T, 1, *leaf.shape[2:]), BATCH)
    each = expected_dots(row_losses, P, places, direction)
    ids = np.ravel(LABELS)
    expected = jax.tree.map(lambda d: np.array([d[ids == k].sum() for k in range(5)]), each)
    for result in run(P, BATCH):
        testing.assert_dots_close(result.dots, expected)
        testing.assert_dots_close(result.shared, jax.tree.map(lambda d: d[ids < 0].sum(), each))
        assert int(result.conflicts) == 0


def test_norms_and_clipping():
    loss_fn = loss_with(tiled(3))

    @jax.jit
    def run(p, batch):
        return squared_norms(loss_fn)(p, batch), value_and_clipped_grad(loss_fn, 1.0)(p, batch)[1]

    norms, clipped = run(P, BATCH)
    grads = testing.per_example_grads(row_losses, P, BATCH)
    squares = jax.tree.map(lambda g: (np.asarray(g, np.float64) ** 2).reshape(B, -1).sum(1), grads)
    testing.assert_dots_close(norms, squares)
    factors = np.minimum(1, 1 / np.sqrt(sum(jax.tree.leaves(squares))))
    testing.assert_dots_close(
        clipped, jax.tree.map(lambda g: np.tensordot(factors, np.asarray(g), 1) / B, grads)
    )


@pytest.mark.slow
def test_bfloat16():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), P)
    batch = {**BATCH, "x": BATCH["x"].astype(jnp.bfloat16)}
    direction = direction_like(params)
    fn = value_grad_and_dots(loss_with(tiled(3)))
    result = jax.jit(lambda p, b: fn(p, b, direction=direction))(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype("float32")}
    expected = expected_dots(row_losses, params, batch, direction)
    testing.assert_dots_close(result.dots, expected, rtol=2e-2)


@pytest.mark.slow
def test_no_more_than_a_chunk_is_held():
    size, vocabulary, tiles = 16, 4096, 32
    params = {**P, "head": draw(F, vocabulary)}
    batch = jax.tree.map(lambda leaf: jnp.tile(leaf, (size, 1, *[1] * (leaf.ndim - 2))), BATCH)
    loss_fn, direction = loss_with(tiled(tiles)), direction_like(params)

    def late(p, batch):
        return value_and_dots_fn(loss_fn)(p, batch)[2](direction)

    logits = size * B * T * vocabulary * 4
    for fn in (late, lambda p, b: value_grad_and_dots(loss_fn)(p, b, direction=direction)):
        memory = jax.jit(fn).lower(params, batch).compile().memory_analysis()
        assert memory.temp_size_in_bytes < logits / 4


def edited(change):
    def one(own, h, y, mask):
        d = (jax.nn.softmax(h @ own[1]) - jax.nn.one_hot(y, V)) * mask.astype(h.dtype)[:, None]
        d = change(d)
        return (jnp.zeros_like(own[0]), jnp.einsum("nf,nv->fv", h, d)), d @ own[1].T

    return one


def rounded(own, h, y, mask):
    of_own, of_h = gradients(own, h, y, mask)
    return jax.tree.map(jnp.round, of_own), of_h


MIXING = {
    "centred": (
        edited(lambda d: d - d.mean(0, keepdims=True)),
        "combines rows with a value in which rows are mixed",
    ),
    "clipped in all": (
        edited(lambda d: d / jnp.linalg.norm(d)),
        "combines rows with a value in which rows are mixed",
    ),
    "rounded after the sum": (rounded, "must be a sum over rows, or linear in such sums.*round"),
}


@pytest.mark.parametrize(("name", "tiles"), crossed(MIXING, [1, 2]))
def test_rules_that_mix_rows_are_refused(name, tiles):
    one, message = MIXING[name]
    with pytest.raises(RowAxisError, match=message):
        jax.eval_shape(value_grad_and_dots(loss_with(tiled(tiles, one))), P, BATCH, direction=P)


@pytest.mark.slow
def test_rows_paired_with_other_rows():
    def one(own, h, y, mask):
        of_own, of_h = edited(lambda d: d[::-1])(own, h, y, mask)
        return of_own, of_h[::-1]

    fn = value_grad_and_dots(loss_with(tiled(1, one)))
    with pytest.raises(RowAxisError, match="combines rows with other rows"):
        jax.eval_shape(fn, P, BATCH, direction=P)
    fn = value_grad_and_dots(loss_with(tiled(2, one)))
    result = jax.jit(lambda p, b: fn(p, b, direction=p))(P, BATCH)
    assert int(result.conflicts) > 0
    assert bool(jnp.isnan(result.total()).all())


def test_the_way_out_of_a_refused_rule():
    """The loss of one row with ``per_example=True`` takes any rule."""
    fused = tiled(2, rounded)

    def of_one(p, row):
        batch = jax.tree.map(lambda leaf: leaf[None], row)
        return loss_with(fused, 1)(p, batch)

    direction = direction_like(P)
    fn = value_grad_and_dots(of_one, per_example=True, loss_reduction="sum")
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(P, BATCH, direction)
    expected = one_by_one(lambda p, b: loss_with(fused, 1)(p, b)[None], P, BATCH, direction)
    testing.assert_dots_close(result.dots, expected)
