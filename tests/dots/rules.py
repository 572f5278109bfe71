"""The table of layers whose backward rules are not linear in the cotangent.

Each gives (row_losses(params, batch) -> [N], params, batch).
"""

import functools

import jax
import jax.numpy as jnp

from models.arrays import FEATURES, activations, draw, mean_squares

RULES = {}
WIDTH = 4
PARAMS = {"w": draw(FEATURES, WIDTH), "head": draw(WIDTH, 3, seed=2)}


def rule(build):
    RULES[build.__name__] = build
    return build


def product_with(backward, **settings):
    """``x @ w`` with a backward rule ``backward(x, w, cotangent)``."""

    @functools.partial(jax.custom_vjp, **settings)
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: backward(*kept, g))
    return product


def clip(g):
    return jnp.clip(g, -0.05, 0.05)


def contract(x, g):
    return jnp.einsum("bti,bto->io", x, g)


def rounded_per_token(g):
    size = jnp.max(jnp.abs(g), axis=-1, keepdims=True) / 127 + 1e-12
    return jnp.round(g / size) * size


def model_of(product):
    def losses(params, x):
        h = jnp.tanh(product(jnp.sin(x), params["w"]))
        return mean_squares(product(h, params["w"].T) @ params["w"] @ params["head"])

    return losses, PARAMS, activations()


def rule_of_product(backward):
    """A rule as a row of the table."""

    @functools.wraps(backward)
    def build():
        return model_of(product_with(backward))

    return rule(build)


@rule_of_product
def clipped(x, w, g):
    g = clip(g)
    return g @ w.T, contract(x, g)


@rule_of_product
def clipped_after_the_product(x, w, g):
    """Every row's own weight gradient is clipped."""
    return g @ w.T, clip(jnp.einsum("bti,bto->bio", x, g)).sum(axis=0)


@rule_of_product
def sign(x, w, g):
    g = jnp.sign(g) / 8
    return g @ w.T, jnp.tensordot(x, g, axes=((0, 1), (0, 1)))


@rule_of_product
def rounded(x, w, g):
    g = rounded_per_token(g)
    return g @ w.T, (x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]))


@rule_of_product
def normalised(x, w, g):
    g = g / (jnp.linalg.norm(g, axis=(1, 2), keepdims=True) + 1e-6)
    x, g = jnp.swapaxes(x, 0, 1), jnp.swapaxes(g, 0, 1)
    flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.swapaxes(g @ w.T, 0, 1), 2 * jnp.einsum("ni,no->io", *flat)


@rule_of_product
def eight_bits(x, w, g):
    """Products of integers, with a scale per row."""

    def quantised(array):
        size = jnp.max(jnp.abs(array), axis=(1, 2), keepdims=True) / 127 + 1e-12
        return jnp.round(array / size).astype(jnp.int8), size

    (x, of_x), (g, of_g) = quantised(x), quantised(g)
    product = jnp.einsum("bti,bto->bio", x, g, preferred_element_type=jnp.int32)
    back = g.astype(jnp.float32) * of_g @ w.T
    return back, jnp.sum(product.astype(jnp.float32) * (of_x * of_g), axis=0)


@rule_of_product
def looped_over_positions(x, w, g):
    g = clip(g)

    def add(total, pair):
        return total + jnp.einsum("bi,bo->io", *pair), None

    pairs = jnp.swapaxes(x, 0, 1), jnp.swapaxes(g, 0, 1)
    return g @ w.T, jax.lax.scan(add, jnp.zeros_like(w), pairs)[0]


@rule_of_product
def looped_with_a_counter(x, w, g):
    g = clip(g)

    def add(position, total):
        x_t, g_t = (jax.lax.dynamic_index_in_dim(a, position, 1, False) for a in (x, g))
        return total.at[:2].add(x_t[:, :2].T @ g_t).at[2:].add(x_t[:, 2:].T @ g_t)

    return g @ w.T, jax.lax.fori_loop(0, x.shape[1], add, jnp.zeros_like(w))


@rule_of_product
def rounded_in_a_loop(x, w, g):
    """What each round sums is not linear in the cotangent; the loop is, in these sums."""

    def add(total, pair):
        return total + pair[0].T @ jnp.round(pair[1] * 64), None

    pairs = jnp.swapaxes(x, 0, 1), jnp.swapaxes(g, 0, 1)
    return g @ w.T, jax.lax.scan(add, jnp.zeros_like(w), pairs)[0]


@rule_of_product
def branches(x, w, g):
    """Branches that a constant takes, before and after the sum."""
    g = jax.lax.cond(jnp.bool_(True), clip, jnp.sin, g)
    total = jax.lax.cond(w[0, 0] > 9, jnp.zeros_like, lambda dw: dw * 2, contract(x, g))
    return g @ w.T, jnp.where(w > 0, total, jax.lax.stop_gradient(total) * w) / 3


@rule_of_product
def position_by_position(x, w, g):
    """A loop that is not linear, and keeps rows in place."""

    def step(carry, g_t):
        carry = jnp.tanh(carry + g_t)
        return carry, carry

    _, g = jax.lax.scan(step, jnp.zeros_like(g[:, 0]), jnp.swapaxes(g, 0, 1))
    return jnp.swapaxes(g, 0, 1) @ w.T, jnp.einsum("bti,tbo->io", x, g)


@rule_of_product
def frozen(x, w, g):
    return clip(g) @ w.T, jnp.zeros_like(w)


@rule
def scale_and_shift():
    """Parameters that are added up without a product, with two outputs and an integer."""

    @jax.custom_vjp
    def norm(x, scale, shift):
        y = x * scale[None, None] + shift[None, None]
        return y, jnp.argmax(x, axis=-1), 2 * y

    def backward(kept, cotangents):
        x, scale = kept
        g = clip(cotangents[0]) + jnp.sign(cotangents[2]) / 16
        return g * scale[None, None], jnp.sum(g * x, axis=(0, 1)), g.sum(axis=1).sum(axis=0)

    norm.defvjp(lambda x, scale, shift: (norm(x, scale, shift), (x, scale)), backward)

    def losses(params, x):
        x, best, twice = norm(x @ params["w"], params["scale"], params["shift"])
        x, _, _ = norm(jnp.sin(x), params["shift"], params["scale"])
        return mean_squares(x + twice * best[..., None].astype(x.dtype))

    params = {"w": draw(FEATURES, WIDTH), "scale": draw(WIDTH), "shift": draw(WIDTH, seed=2)}
    return losses, params, activations()


@rule
def embeddings():
    @jax.custom_vjp
    def embed(table, ids):
        return table[ids]

    def backward(kept, g):
        table, ids = kept
        return jnp.zeros_like(table).at[ids].add(rounded_per_token(clip(g))), None

    embed.defvjp(lambda table, ids: (table[ids], (table, ids)), backward)

    def losses(params, ids):
        return mean_squares(jnp.sin(embed(params["table"], ids)) @ params["w"])

    ids = (jnp.arange(24).reshape(4, 6) * 5) % 9  # the table has 7 rows
    return losses, {"table": draw(7, FEATURES), "w": PARAMS["w"]}, ids


@rule
def promised_embeddings():
    """The rule adds at places that it promises to be in range, where some are not."""

    @jax.custom_vjp
    def embed(table, ids):
        return table[ids]

    def backward(kept, g):
        table, ids = kept
        added = jnp.zeros_like(table).at[ids].add(clip(g), mode="promise_in_bounds")
        return added + added[jnp.array([0, 1, 2, 9, 4, 5, 6])], None

    embed.defvjp(lambda table, ids: (table[ids], (table, ids)), backward)

    def losses(params, ids):
        return mean_squares(jnp.sin(embed(params["table"], ids)) @ params["w"])

    return losses, {"table": draw(7, FEATURES), "w": PARAMS["w"]}, embeddings()[2]


@rule
def convolution():
    def plain(x, kernel):
        dims = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=dims)

    conv = jax.custom_vjp(plain)
    conv.defvjp(
        lambda x, kernel: (plain(x, kernel), (x, kernel)),
        lambda kept, g: jax.vjp(plain, *kept)[1](clip(g)),
    )

    def losses(params, x):
        return mean_squares(conv(jnp.tanh(conv(x, params["kernel"])), params["kernel"]))

    return losses, {"kernel": draw(3, FEATURES, FEATURES)}, activations()


@rule
def inside_control_flow():
    product = product_with(lambda x, w, g: (clip(g) @ w.T, contract(x, clip(g))))

    def losses(params, x):
        def layer(x, w):
            x = jax.jit(product)(x, w)
            x = jax.checkpoint(lambda x: jnp.sin(product(x, w)))(x)
            return jax.lax.cond(w[0, 0] < 9, product, lambda x, w: x, x, w), None

        return mean_squares(jax.lax.scan(layer, x, params["layers"])[0])

    return losses, {"layers": 0.3 * draw(2, FEATURES, FEATURES)}, activations()


@rule
def rows_of_their_own():
    """A parameter that is repeated for every row before it meets data."""

    @jax.custom_vjp
    def add(x, state):
        return x + state[:, None]

    add.defvjp(lambda x, state: (add(x, state), None), lambda _, g: (g, clip(g).sum(axis=1)))

    def losses(params, x):
        state = jnp.broadcast_to(params["state"], (x.shape[0], FEATURES))
        return mean_squares(jnp.sin(add(x, state)))

    return losses, {"state": draw(1, FEATURES)}, activations()


@rule
def symbolic_zeros():
    """A rule that asks what is differentiated, and which cotangents there are."""

    @jax.custom_vjp
    def product(x, w, scale):
        return x @ w * scale, x

    def forward(x, w, scale):
        assert w.perturbed
        assert not scale.perturbed
        x, w = x.value, w.value
        return (x @ w * scale.value, x), (x, w, scale.value)

    def backward(kept, cotangents):
        x, w, scale = kept
        g = jnp.sign(cotangents[0]) * scale
        return g @ w.T, contract(x, g), jnp.zeros_like(scale)

    product.defvjp(forward, backward, symbolic_zeros=True)

    def losses(params, x):
        h, _ = product(x, params["w"], jnp.float32(0.2))
        return mean_squares(product(jnp.tanh(h), params["w"].T, jnp.float32(0.1))[0])

    return losses, {"w": PARAMS["w"]}, activations()
