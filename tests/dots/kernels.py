"""Pallas kernels for the tests, interpreted: norms with a scale, attention, and bad ones."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.arrays import draw

B, T, F = 3, 4, 8


def like(*shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def inverse_rms(x):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def rms_forward_kernel(x_ref, scale_ref, y_ref):
    x = x_ref[...]
    y_ref[...] = x * inverse_rms(x) * scale_ref[...]


def rms_backward(x, scale, ct):
    r, weighted = inverse_rms(x), ct * scale
    return r * weighted - x * r**3 * jnp.mean(weighted * x, -1, keepdims=True), ct * x * r


def rms_backward_kernel(x_ref, scale_ref, ct_ref, dx_ref, parts_ref):
    dx_ref[...], parts_ref[...] = rms_backward(x_ref[...], scale_ref[...], ct_ref[...])


def rms_accumulating_kernel(x_ref, scale_ref, ct_ref, dx_ref, dscale_ref):
    dx_ref[...], parts = rms_backward(x_ref[...], scale_ref[...], ct_ref[...])

    @pl.when(pl.program_id(0) == 0)
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)

    dscale_ref[...] += jnp.sum(parts, 0, keepdims=True)


def rms_norm_of(block, *, accumulate=False):
    """RMSNorm of [N, F] in blocks of ``block`` rows, with a backward kernel."""

    def specs(n):
        of_rows = pl.BlockSpec((block, F), lambda i: (i, 0))
        of_scale = pl.BlockSpec((1, F), lambda i: (0, 0))
        return {"grid": (pl.cdiv(n, block),), "interpret": True}, of_rows, of_scale

    @jax.custom_vjp
    def norm(x, scale):
        options, rows, shared = specs(len(x))
        call = pl.pallas_call(
            rms_forward_kernel,
            in_specs=[rows, shared],
            out_specs=rows,
            out_shape=like(*x.shape),
            **options,
        )
        return call(x, scale[None])

    def forward(x, scale):
        return norm(x, scale), (x, scale)

    def backward(kept, ct):
        x, scale = kept
        options, rows, shared = specs(len(x))
        kernel = rms_accumulating_kernel if accumulate else rms_backward_kernel
        dx, dscale = pl.pallas_call(
            kernel,
            in_specs=[rows, shared, rows],
            out_specs=[rows, shared if accumulate else rows],
            out_shape=[like(*x.shape), like(*((1, F) if accumulate else x.shape))],
            **options,
        )(x, scale[None], ct)
        return dx, jnp.sum(dscale, 0)

    norm.defvjp(forward, backward)
    return norm


NORMS = {block: rms_norm_of(block) for block in (1, 2, 4, 8, 12)}
ACCUMULATING = rms_norm_of(1, accumulate=True)
PARAMS = {"w": draw(F, F), "scale": 1 + draw(F, seed=3) / 4}


def norm_of_positions(block):
    """[B, T, F] -> [B * T, F] and back."""

    def losses(params, x):
        h = x @ params["w"]
        y = NORMS[block](h.reshape(-1, F), params["scale"]).reshape(x.shape)
        return jnp.sum(jnp.tanh(y @ params["w"]), (1, 2))

    return losses, PARAMS, draw(B, T, F, seed=1)


def norm_of_time_major():
    """Rows are the inner ones of the merged axis, so that blocks hold one of each row."""

    def losses(params, x):
        h = (x @ params["w"]).swapaxes(0, 1).reshape(-1, F)
        y = NORMS[1](h, params["scale"]).reshape(T, len(x), F)
        return jnp.sum(jnp.tanh(y @ params["w"]), (0, 2))

    return losses, PARAMS, draw(B, T, F, seed=1)


def norm_under_vmap():
    def losses(params, x):
        y = jax.vmap(NORMS[4], in_axes=(0, None))(x @ params["w"], params["scale"])
        return jnp.sum(jnp.tanh(y @ params["w"]), (1, 2))

    return losses, PARAMS, draw(B, T, F, seed=1)


def norm_under_vmap_of_positions():
    """``vmap`` over another axis than that of rows."""

    def losses(params, x):
        norm = jax.vmap(NORMS[1], in_axes=(1, None), out_axes=1)
        y = norm(x @ params["w"], params["scale"])
        return jnp.sum(jnp.tanh(y @ params["w"]), (1, 2))

    return losses, PARAMS, draw(B, T, F, seed=1)


def norm_in_scanned_layers():
    """Kernels in a rematerialised body of a scan over layers."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), PARAMS)

    def losses(params, x):
        @jax.checkpoint
        def layer(h, own):
            flat = (h @ own["w"]).reshape(-1, F)
            return h + jnp.tanh(NORMS[4](flat, own["scale"])).reshape(h.shape), None

        return jnp.sum(jax.lax.scan(layer, x, params)[0] ** 2, (1, 2))

    return losses, params, draw(B, T, F, seed=1)


def attention_kernel(q_ref, k_ref, v_ref, o_ref, top_ref, sum_ref, acc_ref, *, steps):
    """One block of queries, and of keys one after the other; as flash attention has it."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    scores = q_ref[...] @ k_ref[...].T
    top = jnp.maximum(top_ref[...], scores.max(-1, keepdims=True))
    weights, old = jnp.exp(scores - top), jnp.exp(top_ref[...] - top)
    top_ref[...] = top
    sum_ref[...] = sum_ref[...] * old + weights.sum(-1, keepdims=True)
    acc_ref[...] = acc_ref[...] * old + weights @ v_ref[...]

    @pl.when(pl.program_id(1) == steps - 1)
    def _():
        o_ref[...] = acc_ref[...] / sum_ref[...]


def plain_attention(q, k, v):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2), -1) @ v


def flash(q, k, v, *, kernel=attention_kernel, block=2):
    """[BH, T, d], one program for every place of the first axis and block of keys."""
    heads, positions, d = q.shape
    steps = positions // block
    whole = pl.BlockSpec((None, positions, d), lambda b, j: (b, 0, 0))
    keys = pl.BlockSpec((None, block, d), lambda b, j: (b, j, 0))
    return pl.pallas_call(
        functools.partial(kernel, steps=steps),
        grid=(heads, steps),
        in_specs=[whole, keys, keys],
        out_specs=whole,
        out_shape=like(*q.shape),
        scratch_shapes=[
            pltpu.VMEM((positions, 1), jnp.float32),
            pltpu.VMEM((positions, 1), jnp.float32),
            pltpu.VMEM((positions, d), jnp.float32),
        ],
        interpret=True,
    )(q, k, v)


def with_plain_backward(attend):
    """A kernel's forward pass, and the backward pass of plain attention."""

    @jax.custom_vjp
    def attention(q, k, v):
        return attend(q, k, v)

    attention.defvjp(
        lambda *qkv: (attend(*qkv), qkv), lambda qkv, ct: jax.vjp(plain_attention, *qkv)[1](ct)
    )
    return attention


HEADS = 2
PROJECTIONS = {name: draw(F, F, seed=k) / 3 for k, name in enumerate(["q", "k", "v", "o"])}


def attention_losses(attend, *, merged):
    """Multi-head attention between projections; ``attend`` takes [B * H, T, d] or [B, T, H, d]."""

    def losses(params, x):
        def heads(name):
            h = (x @ params[name]).reshape(len(x), T, HEADS, F // HEADS)
            return h.swapaxes(1, 2).reshape(-1, T, F // HEADS) if merged else h

        o = attend(heads("q"), heads("k"), heads("v"))
        if merged:
            o = o.reshape(len(x), HEADS, T, -1).swapaxes(1, 2)
        return jnp.sum(jnp.sin(o.reshape(x.shape) @ params["o"]), (1, 2))

    return losses, PROJECTIONS, draw(B, T, F, seed=1)
