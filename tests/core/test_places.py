"""Every promise of the row tracker, against what changes when one row does."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend import core

from ghostjax.core.places import Mixed, Rows, infer, join
from tests.core.rows import (
    IMAGE,
    SPOTS,
    SQUARE,
    T3,
    WORDS,
    X2,
    X3,
    X4,
    B,
    assert_only,
    draw,
    merged,
    redrawn,
)

MIXED = "mixed"
C2, C3 = jnp.asarray(draw((B, 6), 9)), jnp.asarray(draw((B, B, 6), 9))
TABLE = jnp.asarray(draw((B, 6), 8))
KERNEL = jnp.asarray(draw((3, 3, 3, B), 8))
ONE = jnp.ones((), jnp.int32)
TWO_KEYS = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), B)))


def time_major(x):
    """[B, T, d] -> [T * B, d]."""
    return merged(x.swapaxes(0, 1))


def conv(x, **kwargs):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=dims, **kwargs)


def windows(x, sizes):
    return lax.reduce_window(x, np.float32(0), lax.add, sizes, (1, 1, 1, 1), "SAME")


@jax.custom_vjp
def halved(x):
    return x / 2


halved.defvjp(lambda x: (x / 2, None), lambda _, g: (g / 2,))


def running(x, c):
    return lax.scan(lambda c, t: (c + t, c * t), c, x)


def until(x):
    return lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)


def scan_mixing(x):
    # The second carry takes what the first has summed over rows, one turn later.
    def turn(carry, _):
        a, b = carry
        return (a + a.sum(0, keepdims=True), b + a.sum()), None

    return lax.scan(turn, (x, jnp.zeros(6)), None, length=3)[0][1]


def solve(x):
    return jnp.linalg.solve(x + 9 * jnp.eye(3)[None], x)


def keyed_noise(keys):
    wrapped = jax.random.wrap_key_data(keys)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (3,)))(wrapped)


def case(name, f, *inputs, expected):
    return pytest.param(f, inputs, expected, id=name)


CASES = [
    # Elementwise
    case("scalar", lambda x: 2 * jnp.tanh(x) + 1, X2, expected=Rows(0)),
    case("constant", lambda x: x + C2, X2, expected=Rows(0)),
    case("two inputs", lambda x, y: jnp.where(y > 0, x, y), X2, draw((B, 6), 1), expected=Rows(0)),
    case("clamp", lambda x: jnp.clip(x, -0.5, 0.5), X2, expected=Rows(0)),
    case("elsewhere", lambda x: x[:, :B] + x[:, :B].T, X2, expected=MIXED),
    case("powers", lambda x: (x**3, jnp.exp2(x), jax.lax.erf(x)), X2, expected=[Rows(0)] * 3),
    case("no rows", lambda x: jnp.arange(B), X2, expected=None),
    case("barrier", lambda x: lax.optimization_barrier((x, x.sum(), C2)), X2,
         expected=[Rows(0), MIXED, None]),
    case("bits", lambda x: lax.bitcast_convert_type(x, jnp.uint8), X2, expected=Rows(0)),
    # Shapes
    case("expand", lambda x: x[None, :, None], X2, expected=Rows(1)),
    case("repeat rows", lambda x: jnp.tile(x, (3, 1)), X2, expected=Rows(0, 3, 1)),
    case("table of rows", lambda x: jnp.broadcast_to(x[:, None], (B, B, 6)), X2, expected=Rows(0)),
    case("merge", merged, X3, expected=Rows(0, 1, B)),
    case("merge time-major", time_major, X3, expected=Rows(0, B, 1)),
    case("merge all", jnp.ravel, X3, expected=Rows(0, 1, 6 * B)),
    case("merge middle", lambda x: x.transpose(1, 0, 2).reshape(-1), X3,
         expected=Rows(0, B, 6)),
    case("split again", lambda x: merged(x).reshape(B, B, 6), X3, expected=Rows(0)),
    case("split time-major", lambda x: time_major(x).reshape(B, B, 6), X3, expected=Rows(1)),
    case("split in part", lambda x: merged(x).reshape(2 * B, 2, 3), draw((B, 4, 3)),
         expected=Rows(0, 1, 2)),
    case("split outer", lambda x: time_major(x).reshape(2, 2 * B, 6), X3, expected=Rows(1, 2, 1)),
    case("straddle", lambda x: time_major(x).reshape(2 * B, 2, 6), X3, expected=MIXED),
    case("straddle features", lambda x: x.T.reshape(B, 6), X2, expected=MIXED),
    case("merge kinds meet", lambda x: merged(x) + time_major(x), X3, expected=MIXED),
    case("heads", lambda x: x.reshape(B, 2 * B, 6), X4, expected=Rows(0)),
    case("split heads", lambda x: x.reshape(B, B, 2, 3), X3, expected=Rows(0)),
    case("heads first", lambda x: jnp.einsum("bthd->hbtd", x), X4, expected=Rows(1)),
    case("heads and rows", lambda x: jnp.einsum("bthd->hbtd", x).reshape(-1, 2 * B, 3), X4,
         expected=Rows(0, 2, 1)),
    case("merge in another order", lambda x: lax.reshape(x, (B * B, 6), (1, 0, 2)), X3,
         expected=Rows(0, B, 1)),
    case("unit axes", lambda x: x.reshape(1, B, 1, 6).squeeze(2), X2, expected=Rows(1)),
    case("transpose", lambda x: x.transpose(2, 1, 0), X3, expected=Rows(2)),
    # Parts
    case("reverse time", lambda x: x[:, ::-1], X3, expected=Rows(0)),
    case("reverse rows", lambda x: x[::-1], X3, expected=MIXED),
    case("roll time", lambda x: jnp.roll(x, 1, axis=1), X3, expected=Rows(0)),
    case("roll rows", lambda x: jnp.roll(x, 1, axis=0), X3, expected=MIXED),
    case("shift", lambda x: (x[:, 1:], x[:, -1], x[:, 0]), X3, expected=[Rows(0)] * 3),
    case("some rows", lambda x: x[: B // 2], X3, expected=MIXED),
    case("row pairs", lambda x: x[::2] - x[1::2], X3, expected=MIXED),
    case("first rows, then out of two", lambda x: jnp.concatenate([x, 2 * x])[:B], X2,
         expected=Rows(0)),
    case("pairs of batches", lambda x, y: jnp.concatenate([x, y, x]), X2, draw((B, 6), 1),
         expected=Rows(0, 3, 1)),
    case("batches apart", lambda x: jnp.split(jnp.concatenate([x, 2 * x, -x]), [B]), X2,
         expected=[Rows(0), Rows(0, 2, 1)]),
    case("cut between batches", lambda x: jnp.concatenate([x, 2 * x])[1 : B + 1], X2,
         expected=MIXED),
    case("rows and constants", lambda x: jnp.concatenate([x, C2]), X2, expected=MIXED),
    case("stack", lambda x: (jnp.stack([x, x], 0), jnp.stack([C2, x], 1)), X2,
         expected=[Rows(1), Rows(0)]),
    case("unstack", lambda x: jnp.unstack(x, axis=1)[0], X3, expected=Rows(0)),
    case("unstack rows", lambda x: jnp.unstack(x)[0], X3, expected=MIXED),
    case("one row", lambda x: x[2], X3, expected=MIXED),
    case("repeat each", lambda x: jnp.repeat(x, 3, axis=0), X3, expected=Rows(0, 1, 3)),
    case("append token", lambda x: jnp.concatenate([C3[:, :1], x], axis=1), X3, expected=Rows(0)),
    case("split features", lambda x: tuple(jnp.split(x, 3, axis=-1)), X3, expected=[Rows(0)] * 3),
    case("split rows", lambda x: tuple(jnp.split(x, 2)), X3, expected=[MIXED] * 2),
    case("pad time", lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))), X3, expected=Rows(0)),
    case("pad rows", lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0))), X3, expected=MIXED),
    case("dynamic slice", lambda x: lax.dynamic_slice_in_dim(x, ONE, 2, axis=1), X3,
         expected=Rows(0)),
    case("dynamic rows", lambda x: lax.dynamic_slice_in_dim(x, ONE, 2, axis=0), X3,
         expected=MIXED),
    case("place said by rows",
         lambda x, n: lax.dynamic_slice_in_dim(x, n.max(), 2, axis=1), X3, SPOTS, expected=Rows(0)),
    case("update a cache", lambda x: lax.dynamic_update_slice(C3, x, (0, ONE, 0)), X3[:, :2],
         expected=Rows(0)),
    case("update rows", lambda x: lax.dynamic_update_slice(C3, x, (ONE, 0, 0)), X3[:2],
         expected=MIXED),
    # Reductions and orders
    case("sum features", lambda x: (x.sum(-1), x.max((1, 2)), jnp.argmax(x, 1)), X3,
         expected=[Rows(0)] * 3),
    case("sum before rows", lambda x: x.sum(1).T.mean(0), X3, expected=Rows(0)),
    case("mean over rows", lambda x: x.mean(0), X3, expected=MIXED),
    case("mean over all", jnp.mean, X3, expected=MIXED),
    case("mean over merged rows", lambda x: time_major(x).mean(0), X3, expected=MIXED),
    case("argmax over rows", lambda x: jnp.argmax(x, 0), X3, expected=MIXED),
    case("generic reduction", lambda x: lax.reduce(x, np.float32(0), lax.max, (1,)), X3,
         expected=Rows(0)),
    case("cumsum time", lambda x: jnp.cumsum(x, 1), X3, expected=Rows(0)),
    case("cumsum rows", lambda x: jnp.cumsum(x, 0), X3, expected=MIXED),
    case("associative scan", lambda x: lax.associative_scan(jnp.add, x, axis=1), X3,
         expected=Rows(0)),
    case("sort time", lambda x: (jnp.sort(x, 1), jnp.argsort(x, 1)), X3, expected=[Rows(0)] * 2),
    case("sort rows", lambda x: jnp.sort(x, 0), X3, expected=MIXED),
    case("rank rows", lambda x: jnp.argsort(x[:, 0]), X2, expected=MIXED),
    case("top k", lambda x: lax.top_k(x, 2), X3, expected=[Rows(0)] * 2),
    # Products
    case("dense", lambda x: x @ TABLE.T, X2, expected=Rows(0)),
    case("dense on the left", lambda x: TABLE @ x.T, X2, expected=Rows(1)),
    case("in batch", lambda x: x @ x.T, X2, expected=MIXED),
    case("over rows", lambda x: TABLE.T @ x, X2, expected=MIXED),
    case("attention", lambda x: jnp.einsum("bqd,bkd->bqk", x, x), X3, expected=Rows(0)),
    case("attention across", lambda x: jnp.einsum("bqd,qkd->bqk", x, x), X3, expected=MIXED),
    case("a matrix each", lambda x: jnp.einsum("bd,bde->be", x, C3[:, 0, :, None] * C3[:, :1]), X2,
         expected=Rows(0)),
    case("merged batch", lambda x: jnp.einsum("nd,nd->n", merged(x), merged(x)), X3,
         expected=Rows(0, 1, B)),
    case("merged batches meet", lambda x: jnp.einsum("nd,nd->n", merged(x), time_major(x)), X3,
         expected=MIXED),
    case("bilinear", lambda x: jnp.einsum("bte,bto,eo->b", x, x, jnp.eye(6)), X3, expected=Rows(0)),
    case("dot-product attention", lambda x: jax.nn.dot_product_attention(x, x, x, is_causal=True),
         X4, expected=Rows(0)),
    case("conv", conv, IMAGE, expected=Rows(0)),
    case("conv across", lambda x: conv(x.transpose(1, 0, 2, 3)), IMAGE, expected=MIXED),
    case("conv of conv", lambda x: jax.vmap(conv)(x[:, None]), IMAGE, expected=Rows(0)),
    case("conv by channels first",
         lambda x: lax.conv_general_dilated(x.T, KERNEL, (1, 1), "SAME",
                                            dimension_numbers=("CHWN", "HWIO", "HWNC")),
         IMAGE, expected=Rows(2)),
    case("pool", lambda x: (nn.max_pool(x, (2, 2), (2, 2)), windows(x, (1, 2, 2, 1))), IMAGE,
         expected=[Rows(0)] * 2),
    case("pool across", lambda x: windows(x, (2, 1, 1, 1)), IMAGE, expected=MIXED),
    case("pool's gradient", jax.grad(lambda x: jnp.sum(nn.max_pool(x, (2, 2), (2, 2)) ** 2)),
         IMAGE, expected=Rows(0)),
    # Look-ups
    case("embed", lambda n: TABLE[n], WORDS, expected=Rows(0)),
    case("embed time-major", lambda n: jnp.take(TABLE, n.T, axis=0), WORDS, expected=Rows(1)),
    case("embed features first", lambda n: jnp.take(TABLE.T, n, axis=1), WORDS, expected=Rows(1)),
    case("one hot", lambda n: jax.nn.one_hot(n, B), WORDS, expected=Rows(0)),
    case("take along", lambda x, n: jnp.take_along_axis(x, n[..., None], axis=-1), X3, WORDS,
         expected=Rows(0)),
    case("take along rows", lambda x, n: jnp.take_along_axis(x, n[..., None], axis=0), X3, WORDS,
         expected=MIXED),
    case("shuffle rows", lambda x: x[jnp.array([1, 0, 3, 2])], X3, expected=MIXED),
    case("shuffle time", lambda x: x[:, jnp.array([1, 0, 3, 2])], X3, expected=Rows(0)),
    case("pick by iota", lambda x, n: x[jnp.arange(B), n], T3, SPOTS, expected=MIXED),
    case("pick by vmap", jax.vmap(lambda x, n: x[n]), T3, SPOTS, expected=Rows(0)),
    case("pick time by rows", lambda x, n: x[:, n], X3, SPOTS % B, expected=MIXED),
    case("slice by vmap", jax.vmap(lambda x, n: lax.dynamic_slice_in_dim(x, n, 2)), T3, SPOTS,
         expected=Rows(0)),
    case("set time", lambda x: x.at[:, 0].set(0.0), X3, expected=Rows(0)),
    case("set a row", lambda x: x.at[0].set(0.0), X3, expected=Rows(0)),
    case("add at time", lambda x: C3.at[:, 1].add(x), X2, expected=Rows(0)),
    case("add at rows", lambda x: C3.at[jnp.array([1, 0, 3, 2]), 1].add(x), X2, expected=MIXED),
    case("count words", lambda n: jnp.zeros(B).at[n].add(1.0), WORDS, expected=MIXED),
    case("count each row's", jax.vmap(lambda n: jnp.zeros(B).at[n].add(1.0)), WORDS,
         expected=Rows(0)),
    case("set by vmap", jax.vmap(lambda x, n, y: x.at[n].set(y)), T3, SPOTS, X2, expected=Rows(0)),
    case("gradient of take along",
         jax.grad(lambda x, n: jnp.sum(jnp.take_along_axis(x, n[:, None, None], 1) ** 2)),
         T3, SPOTS, expected=Rows(0)),
    case("gradient of embed", lambda n: jax.grad(lambda w: jnp.sum(w[n] ** 2))(TABLE), WORDS,
         expected=MIXED),
    # Control flow
    case("scan time", lambda x: running(x.swapaxes(0, 1), jnp.zeros((B, 6))), X3,
         expected=[Rows(0), Rows(1)]),
    case("scan time merged",
         lambda x: lax.scan(lambda c, w: (jnp.tanh(c * w), c), time_major(x), C3[0, :, None])[1],
         X3,
         expected=Rows(1, B, 1)),
    case("scan rows", lambda x: running(x, jnp.zeros((B, 6))), X3, expected=[MIXED] * 2),
    case("scan mixes late", scan_mixing, X2, expected=MIXED),
    case("scan moves rows", lambda x: lax.scan(lambda c, _: (c.T, None), x, None, length=2)[0],
         X3[:, :, 0], expected=MIXED),
    case("map rows", lambda x: lax.map(jnp.sin, x), X3, expected=MIXED),
    case("map time", lambda x: lax.map(jnp.sin, x.swapaxes(0, 1)), X3, expected=Rows(1)),
    case("loop", lambda x: lax.fori_loop(0, 3, lambda i, c: c + x, jnp.zeros((B, 6))), X2,
         expected=Rows(0)),
    case("loop said by rows", until, X2, expected=Rows(0)),
    case("branches", lambda x: lax.cond(ONE > 0, lambda v: v, lambda v: C2, x), X2,
         expected=Rows(0)),
    case("branches differ", lambda x: lax.cond(ONE > 0, lambda v: v, lambda v: v.T, x), X3[..., 0],
         expected=MIXED),
    case("constant said by rows", lambda x: lax.cond(x.sum() > 0, lambda: 1.0, lambda: 2.0), X2,
         expected=MIXED),
    case("branch of each row", jax.vmap(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)), X2,
         expected=Rows(0)),
    case("calls", lambda x: jax.checkpoint(jax.jit(jax.nn.relu))(x), X2, expected=Rows(0)),
    case("own backward rule", lambda x: (halved(x), halved(x.T)), X2, expected=[Rows(0), Rows(1)]),
    # Matrices
    case("cholesky", lambda x: jnp.linalg.cholesky(x @ x.mT + jnp.eye(3)[None]), SQUARE,
         expected=Rows(0)),
    case("eigh and qr", lambda x: (*jnp.linalg.eigh(x + x.mT), *jnp.linalg.qr(x)), SQUARE,
         expected=[Rows(0)] * 4),
    case("solve", solve, SQUARE, expected=Rows(0)),
    case("qr across", lambda x: jnp.linalg.qr(x.swapaxes(0, 1))[0], SQUARE, expected=MIXED),
    case("fft", lambda x: jnp.abs(jnp.fft.fft(x, axis=1)), X3, expected=Rows(0)),
    case("fft rows", lambda x: jnp.abs(jnp.fft.fft(x, axis=0)), X3, expected=MIXED),
    # Losses and noise
    case("cross entropy", optax.softmax_cross_entropy_with_integer_labels, X3, WORDS,
         expected=Rows(0)),
    case("cross entropy merged",
         lambda x, n: optax.softmax_cross_entropy_with_integer_labels(time_major(x), n.T.ravel()),
         X3, WORDS, expected=Rows(0, B, 1)),
    case("other losses",
         lambda x, n: (optax.softmax_cross_entropy(x, jax.nn.one_hot(n, 6)), optax.huber_loss(x),
                       optax.sigmoid_binary_cross_entropy(x, x), optax.l2_loss(x),
                       optax.cosine_similarity(x, x + 1)),
         X3, WORDS, expected=[Rows(0)] * 5),
    case("log-softmax", lambda x: (jax.nn.log_softmax(x), jax.nn.logsumexp(x, 1)), X3,
         expected=[Rows(0)] * 2),
    case("softmax over rows", lambda x: jnp.exp(x).sum(0), X3, expected=MIXED),
    case("dropout", lambda x: nn.Dropout(0.5, deterministic=False).apply(
        {}, x, rngs={"dropout": jax.random.key(0)}), X3, expected=Rows(0)),
    case("a key each", keyed_noise, TWO_KEYS, expected=Rows(0)),
    case("unknown", lambda x: jax.pure_callback(lambda v: v, x, x), X2, expected=MIXED),
]  # fmt: skip


def as_infos(expected, outputs):
    expected = expected if isinstance(expected, list) else [expected] * len(outputs)
    assert len(expected) == len(outputs)
    return expected


@pytest.mark.parametrize(("f", "inputs", "expected"), CASES)
def test_rows_of_outputs(f, inputs, expected):
    closed = jax.make_jaxpr(f)(*inputs)
    inferred = infer(closed.jaxpr, [Rows(0)] * len(inputs), B)
    for got, wanted in zip(inferred, as_infos(expected, inferred), strict=True):
        if wanted is MIXED:
            assert isinstance(got, Mixed), got
            assert got.reason
        else:
            assert got == wanted
    if any(isinstance(i, Rows) for i in inferred):
        run = jax.jit(core.jaxpr_as_fun(closed))
        before = run(*inputs)
        changes = np.zeros(len(inferred))
        for row in range(B):
            after = run(*redrawn(inputs, row))
            for k, info in enumerate(inferred):
                if isinstance(info, Rows):
                    changes[k] += assert_only(row, info, before[k], after[k])
        assert all(n > 0 for n, i in zip(changes, inferred) if isinstance(i, Rows))


def test_mixed_operands_do_not_move_rows():
    # Whether x - mean is allowed is for the caller to say; its rows are where x has them.
    jaxpr = jax.make_jaxpr(lambda x: (x - x.mean(0, keepdims=True), x @ x.T @ x))(X2).jaxpr
    kept, mixed = infer(jaxpr, [Rows(0)], B)
    assert kept == Rows(0)
    branch = jax.make_jaxpr(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x))(X2).jaxpr
    assert infer(branch, [Rows(0)], B) == [Rows(0)]
    where = rf"dot_general at {re.escape(__file__)}:\d+"
    assert re.fullmatch(f"{where} sums over the row axis", mixed.reason)


def test_join():
    assert join(None, None) is None
    assert join(None, Rows(1)) == join(Rows(1), None) == join(Rows(1), Rows(1)) == Rows(1)
    assert isinstance(join(Rows(1), Rows(0)), Mixed)
    assert isinstance(join(Rows(0, 2, 1), Rows(0, 1, 2)), Mixed)
    assert join(Mixed("first"), Mixed("second")) == Mixed("first")
    assert join(Rows(0), Mixed("m")) == join(Mixed("m"), None) == join(None, Mixed("m"))


def test_references_are_not_followed():
    def f(x):
        ref = jax.new_ref(jnp.zeros(B))
        jax.jit(lambda r: r.__setitem__(..., x[:, 0]))(ref)
        return jax.jit(lambda r: r[...])(ref)

    [info] = infer(jax.make_jaxpr(f)(X2).jaxpr, [Rows(0)], B)
    assert isinstance(info, Mixed)


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 5, 1)])
def test_one_row(shape):
    def f(x):
        y = x.reshape(-1, shape[-1]).reshape(shape) + x
        z = x.transpose(1, 0, 2).reshape(-1, shape[-1]).reshape(shape[1], 1, shape[2])
        return y, z.transpose(1, 0, 2), x[:, None], jnp.concatenate([x, x], axis=1).sum((1, 2))

    infos = infer(jax.make_jaxpr(f)(np.zeros(shape, np.float32)).jaxpr, [Rows(0)], 1)
    assert infos == [Rows(0)] * 4
