"""The table of layers that JAX's own control flow and derivative rules make.

Each gives (row_losses(params, batch) -> [N], params, batch).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.arrays import FEATURES, activations, draw, mean_squares

LAYERS = {}


def layer(build):
    LAYERS[build.__name__] = build
    return build


@layer
def mapped_experts():
    """lax.map over experts, in chunks too, and over the positions."""

    def losses(params, x):
        gates = jax.nn.softmax(x @ params["gate"], axis=-1)
        outputs = jax.lax.map(lambda w: jnp.tanh(x @ w), params["experts"])
        chunked = jax.lax.map(lambda b: jnp.sin(x + b[None, None]), params["shifts"], batch_size=2)
        x = jnp.einsum("bte,ebtd->btd", gates, outputs + chunked)
        x = jax.lax.map(lambda x: x @ params["head"], jnp.swapaxes(x, 0, 1))
        return mean_squares(jnp.swapaxes(x, 0, 1))

    params = {
        "gate": draw(FEATURES, 4),
        "experts": draw(4, FEATURES, FEATURES, seed=2),
        "shifts": draw(4, FEATURES, seed=3),
        "head": draw(FEATURES, 3, seed=4),
    }
    return losses, params, activations()


@layer
def routed_experts():
    """Every token goes to its best two experts, whose gates are made to add up to one."""

    def losses(params, x):
        gates, chosen = jax.lax.top_k(x @ params["gate"], 2)
        gates = jax.nn.softmax(gates, axis=-1)
        kernels = params["experts"][chosen]
        x = jnp.einsum("btk,btkdo,btd->bto", gates, kernels, x)
        return mean_squares(jnp.tanh(x))

    params = {"gate": draw(FEATURES, 4), "experts": draw(4, FEATURES, FEATURES, seed=2)}
    return losses, params, activations()


@layer
def branches_in_a_scan():
    """Layers of two kinds in one scan, with parameters of their own in each branch."""

    def losses(params, x):
        def dense(x, layer):
            return jnp.tanh(x @ layer["w"])

        def gated(x, layer):
            return x * jax.nn.sigmoid(layer["b"])[None, None] + params["shift"][None, None]

        def step(x, layer):
            return jax.lax.cond(layer[0], dense, gated, x, layer[1]), None

        layers = {"w": params["w"], "b": params["b"]}
        x, _ = jax.lax.scan(step, x, (jnp.array([True, False, True]), layers))
        return mean_squares(x)

    params = {"w": draw(3, FEATURES, FEATURES), "b": draw(3, FEATURES), "shift": draw(FEATURES)}
    return losses, params, activations()


@layer
def custom_jvp_activations():
    @jax.custom_jvp
    def softsign(x):
        return x / (1 + jnp.abs(x))

    @softsign.defjvp
    def _(primals, tangents):
        return softsign(*primals), tangents[0] / jnp.square(1 + jnp.abs(primals[0]))

    def losses(params, x):
        x = jax.nn.relu(x @ params["w"] + params["b"][None, None])
        x = jax.nn.silu(x @ softsign(params["w"]).T)
        return mean_squares(jax.nn.leaky_relu(softsign(x) @ jax.nn.relu(params["w"])))

    return losses, {"w": draw(FEATURES, FEATURES), "b": draw(FEATURES)}, activations()


@jax.custom_vjp
def fused_norm(x, scale, bias):
    return _fused_norm_forward(x, scale, bias)[0]


def _fused_norm_forward(x, scale, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
    normalized = centred * inverse
    return normalized * scale[None, None] + bias[None, None], (normalized, inverse, scale)


def _fused_norm_backward(residuals, cotangent):
    normalized, inverse, scale = residuals
    g = cotangent * scale[None, None]
    along = normalized * jnp.mean(g * normalized, axis=-1, keepdims=True)
    dx = inverse * (g - jnp.mean(g, axis=-1, keepdims=True) - along)
    return dx, jnp.sum(cotangent * normalized, axis=(0, 1)), jnp.sum(cotangent, axis=(0, 1))


fused_norm.defvjp(_fused_norm_forward, _fused_norm_backward)


@layer
def custom_vjp_norm():
    def losses(params, x):
        x = fused_norm(x, params["scale"], params["bias"])
        x = jax.lax.scan(
            lambda x, w: (jax.jit(fused_norm)(x @ w, params["scale"], params["bias"]), None),
            x,
            params["layers"],
        )[0]
        return mean_squares(jnp.sin(x))

    params = {
        "scale": draw(FEATURES) + 1,
        "bias": draw(FEATURES, seed=2),
        "layers": draw(2, FEATURES, FEATURES),
    }
    return losses, params, activations()


@jax.custom_vjp
def quantised_product(x, w):
    return x @ (jnp.round(w * 4) / 4)


quantised_product.defvjp(
    lambda x, w: (quantised_product(x, w), (x, w)),
    lambda kept, g: (g @ kept[1].T, jnp.einsum("bti,bto->io", kept[0], g)),
)


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w * 4) / 4


straight_through.defvjp(lambda w: (straight_through(w), w), lambda w, g: (g * (jnp.abs(w) < 1.5),))


@layer
def quantised_products():
    """The forward pass rounds the weights, the backward pass does not."""

    def losses(params, x):
        return mean_squares(jnp.tanh(quantised_product(x, params["w"])) @ params["head"])

    return losses, {"w": draw(FEATURES, 4), "head": draw(4, 3)}, activations()


@layer
def quantised_weights():
    """Weights are rounded by themselves, before they meet data."""

    def losses(params, x):
        x = jnp.tanh(x @ straight_through(params["w"]))
        scale = jax.jit(lambda w: straight_through(w) * jnp.max(jnp.abs(w)))(params["head"])
        layers = jax.lax.map(straight_through, params["layers"])
        x = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x @ scale, layers)[0]
        return mean_squares(x)

    params = {
        "w": draw(FEATURES, 4),
        "head": draw(4, 3, seed=2),
        "layers": draw(2, 3, 3, seed=3),
    }
    return losses, params, activations()


@layer
def checkpoint_names():
    name = checkpoint_name
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def losses(params, x):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, w):
            return jnp.sin(name(jnp.tanh(x @ name(w, "kernel")), "hidden")) @ w.T

        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
        return mean_squares(layer(x, params["w"]))

    return losses, {"w": draw(FEATURES, 4), "layers": draw(2, FEATURES, 4)}, activations()


@layer
def weights_from_a_root():
    """The rule of the derivative finds its factor in a loop that has no derivative itself."""

    def solve(w):
        def newton(state):
            count, y = state
            return count + 1, y - (y**3 + y - w) / (3 * y**2 + 1)

        return jax.lax.while_loop(lambda state: state[0] < 20, newton, (0, w))[1]

    @jax.custom_jvp
    def root(w):
        return solve(w)

    @root.defjvp
    def _(primals, tangents):
        return root(*primals), tangents[0] / (3 * solve(*primals) ** 2 + 1)

    def losses(params, x):
        return mean_squares(jnp.tanh(root(x @ root(params["w"]))))

    return losses, {"w": draw(FEATURES, 4)}, activations()


@layer
def custom_vjp_with_integers():
    """A layer with a rule of its own that takes and gives integers too."""

    @jax.custom_vjp
    def nearest(x, table, offset):
        return forward(x, table, offset)[0]

    def forward(x, table, offset):
        distance = jnp.sum(jnp.square(x[..., None, :] - table[None, None]), axis=-1)
        index = (jnp.argmin(distance, axis=-1) + offset) % table.shape[0]
        return (table[index] * x, index), (x, table, index)

    def backward(residuals, cotangents):
        x, table, index = residuals
        g, _ = cotangents
        return g * table[index], jnp.zeros_like(table).at[index].add(g * x), None

    nearest.defvjp(forward, backward)

    def losses(params, x):
        y, index = nearest(x, params["table"], jnp.int32(1))
        return mean_squares(jnp.sin(y + params["table"][index]))

    return losses, {"table": draw(7, FEATURES)}, activations()


@layer
def fused_cross_entropy():
    """The loss of the last layer, whose backward rule loops over parts of the vocabulary."""
    parts, size = 3, 4

    def forward(x, table, labels):
        logits = x @ table.reshape(-1, FEATURES).T
        total = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return total - picked, (x, table, labels, total)

    def backward(kept, g):
        x, table, labels, total = kept

        def part(dx, given):
            start, rows = given
            wanted = jax.nn.one_hot(labels - start, size)
            d = (jnp.exp(x @ rows.T - total[..., None]) - wanted) * g[..., None]
            return dx + d @ rows, jnp.einsum("btv,btf->vf", d, x)

        given = jnp.arange(parts) * size, table
        return *jax.lax.scan(part, jnp.zeros_like(x), given), None

    loss = jax.custom_vjp(lambda *args: forward(*args)[0])
    loss.defvjp(forward, backward)

    def losses(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"])
        return jnp.mean(loss(x, params["table"], batch["labels"]), axis=1)

    params = {"w": draw(FEATURES, FEATURES), "table": draw(parts, size, FEATURES, seed=2)}
    x = activations()
    labels = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % (parts * size)
    return losses, params, {"x": x, "labels": labels}


@layer
def fused_recurrence():
    """A cell over time whose backward rule runs the other way and adds up as it goes."""

    def forward(x, w, u):
        def cell(h, x):
            after = jnp.tanh(x @ w + h @ u)
            return after, (h, after)

        _, (before, after) = jax.lax.scan(cell, jnp.zeros_like(x[:, 0] @ w), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(after, 0, 1), (jnp.swapaxes(x, 0, 1), before, after, w, u)

    def backward(kept, g):
        x, before, after, w, u = kept

        def cell(carry, given):
            dh, dw, du = carry
            x, before, after, g = given
            d = (dh + g) * (1 - jnp.square(after))
            return (d @ u.T, dw + x.T @ d, du + before.T @ d), d @ w.T

        start = jnp.zeros_like(before[0]), jnp.zeros_like(w), jnp.zeros_like(u)
        given = x, before, after, jnp.swapaxes(g, 0, 1)
        (_, dw, du), dx = jax.lax.scan(cell, start, given, reverse=True)
        return jnp.swapaxes(dx, 0, 1), dw, du

    recurrence = jax.custom_vjp(lambda *args: forward(*args)[0])
    recurrence.defvjp(forward, backward)

    def losses(params, x):
        x = recurrence(x, params["w"], params["u"])
        return mean_squares(recurrence(x, params["u"], params["u"].T))

    params = {"w": draw(FEATURES, 4) / 2, "u": draw(4, 4, seed=2) / 2}
    return losses, params, activations()
