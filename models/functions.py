"""The table of plain functions: each gives (losses(params, batch) -> [N], params, batch)."""

import jax
import jax.numpy as jnp
import numpy as np

from models.arrays import FEATURES, POSITIONS, ROWS, activations, draw, mean_squares

FUNCTIONS = {}


def function(build):
    FUNCTIONS[build.__name__] = build
    return build


@function
def positions_without_rows():
    def losses(params, x):
        x = jnp.tanh(x + params["positions"][None])
        return mean_squares(x @ params["w"])

    return losses, {"positions": draw(POSITIONS, FEATURES), "w": draw(FEATURES, 3)}, activations()


@function
def class_token():
    def losses(params, x):
        token = jnp.broadcast_to(params["token"], (x.shape[0], 1, FEATURES))
        x = jnp.tanh(jnp.concatenate([token, x], axis=1) @ params["w"])
        return jnp.sum(x[:, 0] ** 2, axis=-1) + jnp.mean(x, axis=(1, 2))

    return losses, {"token": draw(1, 1, FEATURES), "w": draw(FEATURES, FEATURES)}, activations()


@function
def layers_on_merged_axes():
    def losses(params, x):
        flat = jnp.tanh(x.reshape(-1, FEATURES) @ params["rows_first"])
        x = flat.reshape(x.shape)
        flat = jnp.tanh(jnp.swapaxes(x, 0, 1).reshape(-1, FEATURES) @ params["time_first"])
        return mean_squares(jnp.swapaxes(flat.reshape(POSITIONS, len(x), -1), 0, 1))

    params = {"rows_first": draw(FEATURES, FEATURES), "time_first": draw(FEATURES, 4, seed=3)}
    return losses, params, activations()


@function
def low_rank_adapter():
    frozen = draw(FEATURES, FEATURES, seed=4)

    def losses(params, x):
        return mean_squares(jnp.sin(x @ (frozen + params["a"] @ params["b"])))

    return losses, {"a": draw(FEATURES, 2), "b": draw(2, FEATURES, seed=2)}, activations()


@function
def standardised_weights():
    def losses(params, x):
        w = params["w"]
        w = (w - w.mean(0, keepdims=True)) / (w.std(0, keepdims=True) + 1e-3)
        w = w / jnp.linalg.norm(w)
        return mean_squares(jnp.sin(x @ w))

    return losses, {"w": draw(FEATURES, 4)}, activations()


@function
def mixture_of_experts():
    def losses(params, x):
        gates = jax.nn.softmax(x @ params["gate"], axis=-1)
        experts = jnp.einsum("btd,edo->beto", x, params["experts"])
        return mean_squares(jnp.einsum("bte,beto->bto", gates, jnp.tanh(experts)))

    return losses, {"gate": draw(FEATURES, 3), "experts": draw(3, FEATURES, 4)}, activations()


@function
def einsum_of_three():
    def losses(params, batch):
        return jnp.einsum("bte,bto,eo->b", jnp.sin(batch[0]), batch[1], params["w"]) ** 2

    return losses, {"w": draw(FEATURES, FEATURES)}, (activations(1), activations(2))


@function
def layers_in_a_loop():
    def losses(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w + params["shared"][None, None]), jnp.sum(w**2)

        x, _ = jax.lax.scan(layer, x, params["layers"])
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x * params["gain"]), x)
        return mean_squares(x)

    params = {
        "layers": draw(3, FEATURES, FEATURES),
        "shared": draw(FEATURES),
        "gain": jnp.float32(1.3),
    }
    return losses, params, activations()


@function
def learned_initial_state():
    def losses(params, x):
        def cell(h, x):
            h = jnp.tanh(x @ params["w"] + h @ params["u"])
            return h, h

        start = jnp.broadcast_to(params["start"], (len(x), FEATURES))
        _, outputs = jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
        return mean_squares(jnp.swapaxes(outputs, 0, 1))

    params = {
        "w": draw(FEATURES, FEATURES),
        "u": draw(FEATURES, FEATURES, seed=2),
        "start": draw(1, FEATURES),
    }
    return losses, params, activations()


@function
def weights_that_evolve_in_the_loop():
    def losses(params, x):
        def layer(carry, _):
            x, w = carry
            return (jnp.tanh(x @ w), w @ params["step"]), None

        (x, w), _ = jax.lax.scan(layer, (x, params["w"]), None, length=3)
        return mean_squares(x @ w)

    params = {"w": draw(FEATURES, FEATURES), "step": draw(FEATURES, FEATURES, seed=2) / 2}
    return losses, params, activations()


@function
def branch_and_checkpoint():
    def losses(params, x):
        @jax.checkpoint
        def block(x, w):
            return jnp.tanh(x @ w)

        policy = jax.checkpoint_policies.dots_saveable
        for flag in (0, 1):
            x = jax.lax.cond(flag > 0, block, lambda x, w: jnp.sin(x @ w.T), x, params["w"])
        return mean_squares(jax.checkpoint(block, policy=policy)(x, params["w"]))

    return losses, {"w": draw(FEATURES, FEATURES)}, activations()


@function
def custom_jvp_with_a_parameter():
    @jax.custom_jvp
    def gate(x, slope):
        return jnp.where(x > 0, x, x * slope)

    @gate.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda x, slope: jnp.where(x > 0, x, x * slope), primals, tangents)

    def losses(params, x):
        return mean_squares(gate(x, params["slope"]))

    return losses, {"slope": jnp.float32(0.2)}, activations()


@function
def embedding_and_labels():
    def losses(params, batch):
        x = jnp.take(params["table"], batch["ids"], axis=0) + params["table"][batch["ids"] // 2]
        logits = jnp.tanh(x) @ params["table"].T
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, batch["ids"][..., None], axis=-1)[..., 0]
        smoothed = -(0.9 * picked + 0.1 * log_probs.mean(-1))
        return jnp.sum(smoothed * batch["mask"], axis=1) / jnp.sum(batch["mask"], axis=1)

    generator = np.random.default_rng(0)
    batch = {
        "ids": jnp.asarray(generator.integers(0, 7, (ROWS, POSITIONS))),
        "mask": jnp.asarray(generator.integers(0, 2, (ROWS, POSITIONS)), jnp.float32)
        .at[:, 0]
        .set(1),
    }
    return losses, {"table": draw(7, FEATURES)}, batch
