"""Steps that act on every row by itself: over its positions."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.places import chosen
from tests.fuzz.state import Step


def along(array, axis, rank):
    """[T] or [T, F] with its first axis at ``axis`` of that rank."""
    tail = array.ndim - 1
    return jnp.expand_dims(array, [k for k in range(rank - tail) if k != axis])


def _before(h, axis):
    """Every position's predecessor."""
    widths = [(0, 0)] * h.ndim
    widths[axis] = (1, 0)
    return lax.slice_in_dim(jnp.pad(h, widths), 0, h.shape[axis], axis=axis)


def _attend(h, axis, *, causal=False):
    h = jnp.moveaxis(h, axis, -2)
    scores = jnp.einsum("...tf,...sf->...ts", h, jnp.sin(h))
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(jnp.expand_dims(seen, range(scores.ndim - 2)), scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.moveaxis(jnp.einsum("...ts,...sf->...tf", weights, h), -2, axis)


def _recurrent(h, axis, reverse=False):
    def cell(state, each):
        state = jnp.tanh(state * 0.5 + each)
        return state, state

    xs = jnp.moveaxis(h, axis, 0)
    return jnp.moveaxis(lax.scan(cell, jnp.zeros_like(xs[0]), xs, reverse=reverse)[1], 0, axis)


def _chosen_position(h, c, axis):
    """The position that the row's first one names, for all."""
    index = chosen(lax.index_in_dim(c, 0, axis, keepdims=True), h.shape[axis])
    return h + jnp.take_along_axis(h, index[..., None], axis=axis)


def _summed_so_far(h, axis):
    return lax.associative_scan(jnp.add, h, axis=axis)


def _smoothed(h, axis):
    """A depthwise convolution."""
    h = jnp.moveaxis(h, axis, -2)
    kernel = jnp.broadcast_to(jnp.array([0.5, 1.0, -0.5])[:, None, None], (3, 1, h.shape[-1]))
    out = lax.conv_general_dilated(
        h.reshape(-1, *h.shape[-2:]),
        kernel.astype(h.dtype),
        (1,),
        [(2, 0)],
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=h.shape[-1],
    )
    return jnp.moveaxis(out.reshape(h.shape), -2, axis)


# Those that leave a use of a parameter, before and after, at its position.
LENIENT = {
    "cumsum": lambda h, c, t: jnp.cumsum(h, axis=t),
    "minus the one before": lambda h, c, t: h - 0.5 * _before(h, t),
    "recurrent": lambda h, c, t: _recurrent(h, t),
    "recurrent, backwards": lambda h, c, t: _recurrent(h, t, reverse=True),
    "attention": lambda h, c, t: h + _attend(h, t),
    "causal attention": lambda h, c, t: _attend(h, t, causal=True),
    "convolution": lambda h, c, t: _smoothed(h, t),
}
STRICT = {
    **LENIENT,
    "softmax": lambda h, c, t: jax.nn.softmax(h, axis=t) * h,
    "associative scan": lambda h, c, t: _summed_so_far(h, t),
    "flip": lambda h, c, t: jnp.flip(h, axis=t) + h,
    "roll": lambda h, c, t: jnp.roll(h, 1, axis=t) * h,
    "sort": lambda h, c, t: jnp.sort(h, axis=t),
    "mean": lambda h, c, t: h - jnp.mean(h, axis=t, keepdims=True),
    "max": lambda h, c, t: h / (1 + jnp.max(jnp.abs(h), axis=t, keepdims=True)),
    "chosen position": _chosen_position,
    "argsort": lambda h, c, t: jnp.take_along_axis(h, jnp.argsort(c[..., :1], axis=t), axis=t),
    "logsumexp": lambda h, c, t: h - jax.nn.logsumexp(h, axis=t, keepdims=True),
    "cumprod": lambda h, c, t: jnp.cumprod(jnp.tanh(h) + 1.5, axis=t),
    "halves": lambda h, c, t: jnp.concatenate(
        [lax.slice_in_dim(h, 1, None, axis=t), lax.slice_in_dim(h, 0, 1, axis=t)], axis=t
    ),
}  # fmt: skip


def _position_table(p, h, c, axis):
    return h + along(p["positions"], axis, h.ndim)


def _scaled_by_position(p, h, c, axis):
    return h * along(p["positions"][:, 0], axis, h.ndim - 1)[..., None]


def _first_token(p, h, c, axis):
    first = lax.slice_in_dim(h, 0, 1, axis=axis)
    token = jnp.broadcast_to(p["b"], first.shape)
    return jnp.concatenate([token, lax.slice_in_dim(h, 1, None, axis=axis)], axis=axis)


def _mixed_positions(p, h, c, axis):
    size = h.shape[axis]
    mixing = p["positions"] @ p["positions"].T
    return h + jnp.moveaxis(jnp.tensordot(mixing, h, ((1,), (axis,))), 0, axis) / size


def _convolved(p, h, c, axis):
    h = jnp.moveaxis(h, axis, -2)
    out = lax.conv_general_dilated(
        h.reshape(-1, *h.shape[-2:]),
        jnp.stack([p["w"], p["u"]]),
        (1,),
        [(1, 0)],
        dimension_numbers=("NTC", "TIO", "NTC"),
    )
    return jnp.moveaxis(out.reshape(h.shape), -2, axis)


def _recurrent_with_parameters(p, h, c, axis):
    def cell(state, each):
        state = jnp.tanh(each @ p["w"] + state @ p["u"])
        return state, state

    xs = jnp.moveaxis(h, axis, 0)
    start = jnp.broadcast_to(p["b"], xs[0].shape)
    return jnp.moveaxis(lax.scan(cell, start, xs)[1], 0, axis)


def _last_position(p, h, c, axis):
    last = lax.index_in_dim(h, h.shape[axis] - 1, axis, keepdims=False)
    return h + jnp.expand_dims(last @ p["w"], axis)


def _pooled(p, h, c, axis):
    return h * jnp.expand_dims(jax.nn.sigmoid(jnp.mean(h, axis=axis) @ p["u"]), axis)


USES = [
    _position_table, _scaled_by_position, _first_token, _mixed_positions, _convolved,
    _recurrent_with_parameters, _last_position, _pooled,
]  # fmt: skip


def draw_row(rng, *, lenient=False) -> Step:
    """A step of this file; leniently, one that leaves positions where they are."""
    if not lenient and rng.integers(2):
        function = USES[rng.integers(len(USES))]

        def use(reading, values, kind):
            return values._replace(h=reading.use_by_row(function, values, kind)), kind

        return Step(f"use by row: {function.__name__[1:]}", use)
    group = LENIENT if lenient else STRICT
    name = str(rng.choice([*group]))

    def run(reading, values, kind):
        return values._replace(h=group[name](values.h, values.c, kind.index("t"))), kind

    return Step(f"rows: {name}", run)
