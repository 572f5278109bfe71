"""Steps that act on every place by itself, with parameters."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.state import Step, expanded, repeated


@jax.custom_vjp
def product_by_rule(h, w):
    return h @ w


def _product_backward(kept, cotangent):
    h, w = kept
    flat = [array.reshape(-1, array.shape[-1]) for array in (h, cotangent)]
    return cotangent @ w.T, flat[0].T @ flat[1]


product_by_rule.defvjp(lambda h, w: (h @ w, (h, w)), _product_backward)


@jax.custom_vjp
def scale_by_rule(h, scale):
    return h * expanded(scale, h)


def _scale_backward(kept, cotangent):
    h, scale = kept
    axes = tuple(range(h.ndim - 1))
    return cotangent * expanded(scale, h), jnp.sum(cotangent * h, axis=axes)


scale_by_rule.defvjp(lambda h, scale: (scale_by_rule(h, scale), (h, scale)), _scale_backward)


@jax.custom_vjp
def clipped_gradient(h):
    return h


clipped_gradient.defvjp(lambda h: (h, None), lambda _, ct: (jnp.clip(ct, -0.02, 0.02),))


@jax.custom_jvp
def squashed(h):
    return h / (1 + jnp.abs(h))


squashed.defjvp(lambda primals, tangents: (squashed(*primals), tangents[0] / (1 + abs(primals[0]))))


def chosen(c, count):
    """An integer at every place that data decide."""
    return jnp.floor(jnp.abs(c[..., 0]) * 7).astype(jnp.int32) % count


# Matrices [F, F] made of parameters alone.
MATRICES = {
    "w": lambda p, w: p[w],
    "w.T": lambda p, w: p[w].T,
    "2 * w": lambda p, w: 2 * p[w],
    "w * s": lambda p, w: p[w] * p["s"],
    "w @ u": lambda p, w: p[w] @ p["u"],
    "tanh(w)": lambda p, w: jnp.tanh(p[w]),
    "w / norm": lambda p, w: p[w] / jnp.sqrt(1 + jnp.sum(p[w] ** 2, axis=0, keepdims=True)),
    "w.reshape": lambda p, w: p[w].reshape(-1).reshape(p[w].shape[::-1]),
    "stack[1]": lambda p, w: jnp.stack([p["u"], p[w]])[1],
    "w[::-1]": lambda p, w: p[w][::-1],
    "w + outer(b, b)": lambda p, w: p[w] + jnp.outer(p["b"], p["b"]),
}
VECTORS = {
    "b": lambda p: p["b"],
    "b * s": lambda p: p["b"] * p["s"],
    "w[0]": lambda p: p["w"][0],
    "u.sum(1)": lambda p: jnp.sum(p["u"], axis=1),
    "exp(b)": lambda p: jnp.exp(-jnp.square(p["b"])),
}
PRODUCTS = {
    "h @ w": lambda h, w: h @ w,
    "einsum": lambda h, w: jnp.einsum("...f,fo->...o", h, w),
    "w first": lambda h, w: jnp.moveaxis(
        jnp.tanh(jnp.tensordot(w, h, ((0,), (h.ndim - 1,)))), 0, -1
    ),
    "features first": lambda h, w: jnp.moveaxis(
        jnp.sin(jnp.tensordot(w.T, jnp.moveaxis(h, -1, 0), 1)), 0, -1
    ),
    "by rule": product_by_rule,
    "flat": lambda h, w: (h.reshape(-1, h.shape[-1]) @ w).reshape(h.shape),
    "vmap": lambda h, w: jax.vmap(lambda column: h @ column, in_axes=1, out_axes=-1)(w),
    "split": lambda h, w: sum(h[..., k : k + 1] * expanded(w[k], h) for k in range(h.shape[-1])),
    "jit": lambda h, w: jax.jit(jnp.matmul)(h, w),
    "remat": lambda h, w: jax.checkpoint(lambda h, w: jnp.sin(h @ w))(h, w),
}
VECTOR_USES = {
    "h + v": lambda h, v: h + expanded(v, h),
    "v + h": lambda h, v: repeated(v, h) + h,
    "h * v": lambda h, v: h * expanded(v, h),
    "h - v": lambda h, v: h - repeated(v, h),
    "h / (1 + v * v)": lambda h, v: h / expanded(1 + v * v, h),
    "maximum": lambda h, v: jnp.maximum(h, expanded(v, h)),
    "where": lambda h, v: jnp.where(h > 0.1, h, repeated(v, h)),
    "by rule": scale_by_rule,
    "norm": lambda h, v: (
        h * lax.rsqrt(0.1 + jnp.mean(h * h, axis=-1, keepdims=True)) * expanded(v, h)
    ),
    "set": lambda h, v: h.at[..., 0].set(repeated(v[0], h[..., 0])),
    "add": lambda h, v: h.at[..., 1].add(repeated(v[1], h[..., 1])),
    "concatenate": lambda h, v: jnp.concatenate([h[..., :1], repeated(v, h)[..., 1:]], axis=-1),
    "diag": lambda h, v: h @ jnp.diag(v),
    "pow": lambda h, v: jnp.power(1 + h * h, expanded(jnp.tanh(v), h)) - 1,
}


def _layers(p, h, c):
    def layer(h, w):
        return jnp.tanh(h @ w + expanded(p["b"], h)), None

    return lax.scan(layer, h, jnp.stack([p["w"], p["u"], p["w"].T]))[0]


def _layers_checkpointed(p, h, c):
    @jax.checkpoint
    def layer(h, each):
        w, b = each
        return h + jnp.sin(h @ w + expanded(b, h)), jnp.sum(h)

    stacked = jnp.stack([p["w"], p["u"]]), jnp.stack([p["b"], p["s"] * p["b"]])
    return lax.scan(layer, h, stacked, reverse=True)[0]


def _same_layer_again(p, h, c):
    return lax.fori_loop(0, 2, lambda k, h: jnp.tanh(h @ p["w"]) * (1 + 0.1 * k), h)


def _experts(p, h, c):
    weights = jnp.stack([p["w"], 2 * p["u"], -p["w"]])[chosen(c, 3)]
    return jnp.einsum("...f,...fo->...o", h, weights)


def _experts_masked(p, h, c):
    gates = jax.nn.one_hot(chosen(c, 2), 2, dtype=h.dtype)
    both = jnp.stack([h @ p["w"], h @ p["u"]], axis=-1)
    return jnp.einsum("...fe,...e->...f", both, gates)


def _look_up(p, h, c):
    return h + p["table"][chosen(c, p["table"].shape[0])]


def _look_up_one_hot(p, h, c):
    return h * (jax.nn.one_hot(chosen(c, 5), 5, dtype=h.dtype) @ p["table"])


def _tied_head(p, h, c):
    scores = jax.nn.softmax(h @ p["table"].T, axis=-1)
    return scores @ p["table"] + jnp.take(p["table"], chosen(c, 5), axis=0)


def _gated(p, h, c):
    a, b = jnp.split(h @ jnp.concatenate([p["w"], p["u"]], axis=1), 2, axis=-1)
    return jax.nn.silu(a) * b


def _bilinear(p, h, c):
    return h + jnp.einsum("...f,fo,...o->...", h, p["w"], h)[..., None]


def _one_scalar(p, h, c):
    return h * p["s"] + jnp.sum(c, axis=-1, keepdims=True) * p["s"]


def _as_parameter_until_data(p, h, c):
    start = repeated(p["b"], h)
    return jnp.sin(start) * h + start @ p["w"]


USES = [
    _layers, _layers_checkpointed, _same_layer_again, _experts, _experts_masked, _look_up,
    _look_up_one_hot, _tied_head, _gated, _bilinear, _one_scalar, _as_parameter_until_data,
]  # fmt: skip

# Without parameters.
PLAIN = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "squashed": squashed,
    "softmax over features": functools.partial(jax.nn.softmax, axis=-1),
    "sort features": functools.partial(jnp.sort, axis=-1),
    "cumsum of features": functools.partial(jnp.cumsum, axis=-1),
    "roll features": functools.partial(jnp.roll, shift=1, axis=-1),
    "max of features": lambda h: h - jnp.max(h, axis=-1, keepdims=True),
    "standardized": lambda h: (
        (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1)
    ),
    "stop_gradient": lambda h: h * lax.stop_gradient(jnp.cos(h)),
    "clamp": lambda h: jnp.clip(h, -1.0, 1.5),
    "float32 and back": lambda h: h + 0 * h.astype(jnp.float32).astype(h.dtype),
    "top_k": lambda h: jnp.concatenate([lax.top_k(h, 1)[0], h[..., 1:]], axis=-1),
    "reversed features": lambda h: h[..., ::-1],
    "complex": lambda h: jnp.abs(lax.complex(jnp.cos(h), jnp.sin(h)) + 2.0),
}


def _of_places(text, function) -> Step:
    def run(reading, values, kind):
        return values._replace(h=reading.use(function, values, values.c)), kind

    return Step(text, run)


def draw_place(rng, *, with_parameters=True) -> Step:
    """A step of this file."""
    choice = rng.integers(10) if with_parameters else 9
    if choice < 3:
        matrix, form = (str(rng.choice([*group])) for group in (MATRICES, PRODUCTS))
        name = str(rng.choice(["w", "u"]))

        def product(p, h, c):
            return PRODUCTS[form](h, MATRICES[matrix](p, name))

        return _of_places(f"product: {form}, of w = {name}: {matrix}", product)
    if choice < 5:
        vector, form = (str(rng.choice([*group])) for group in (VECTORS, VECTOR_USES))

        def use(p, h, c):
            return VECTOR_USES[form](h, VECTORS[vector](p))

        return _of_places(f"vector: {form}, of v = {vector}", use)
    if choice < 7:
        function = USES[rng.integers(len(USES))]
        return _of_places(f"use: {function.__name__[1:]}", function)
    name = str(rng.choice([*PLAIN]))
    return Step(
        f"places: {name}",
        lambda reading, values, kind: (values._replace(h=PLAIN[name](values.h)), kind),
    )


CLIPPED = Step(
    "places: clipped gradient",
    lambda reading, values, kind: (values._replace(h=clipped_gradient(values.h)), kind),
)
