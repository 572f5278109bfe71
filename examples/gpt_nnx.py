"""A GPT from scratch in Flax NNX, trained on prose and code; which rows help with code?

    python -m examples.gpt_nnx --steps 60

Texts are those that Python ships: its documentation, and its own source.
"""

import inspect
import textwrap
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ghostjax import InRunValues, directions, value_and_dots_fn

WIDTH, HEADS, LAYERS, LENGTH, BYTES = 32, 2, 2, 48, 128


class Block(nnx.Module):
    def __init__(self, rngs):
        self.before, self.between = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h, mask):
        h = h + self.attention(self.before(h), mask=mask)
        return h + self.down(nnx.gelu(self.up(self.between(h))))


class GPT(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(BYTES, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.last = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):  # [B, T] -> [B, T, BYTES]
        h = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            h = block(h, mask)
        return self.tokens.attend(self.last(h))  # tied weights


def rows(text: str, count: int) -> np.ndarray:
    data = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    return data[: count * (LENGTH + 1)].reshape(count, LENGTH + 1)


def main(steps: int = 60, batch_size: int = 16, seed: int = 0) -> dict[str, float]:
    prose = rows("\n".join(topics.topics.values()), 128)
    code = rows(inspect.getsource(inspect), 160)
    train, val = jnp.concatenate([prose, code[:128]]), jnp.asarray(code[128:])
    graphdef, params, rest = nnx.split(GPT(nnx.Rngs(seed)), nnx.Param, ...)
    optimizer = optax.adamw(3e-3)

    def loss_fn(params, tokens):
        logits = nnx.merge(graphdef, params, rest, copy=True)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, values, ids):
        loss, grads, dots = value_and_dots_fn(loss_fn)(params, train[ids])
        val_grads = jax.grad(loss_fn)(params, val)
        direction = directions.through_optimizer(optimizer, state, params, grads, val_grads)
        values = values.add(ids, dots.result(direction).total() / batch_size)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, values, loss

    state, values = optimizer.init(params), InRunValues.zeros(len(train))
    rng = np.random.default_rng(seed)
    for number in range(steps):
        ids = jnp.asarray(rng.choice(len(train), batch_size, replace=False))
        params, state, values, loss = step(params, state, values, ids)
        if number % 20 == 0:
            print(f"step {number}: loss {loss:.2f} nats per byte")
    found = np.asarray(values.of("val"))
    best = int(found.argmax())
    text = bytes(np.asarray(train[best], np.uint8)).decode()
    print(f"helped most: {textwrap.shorten(text, 60)!r} ({found[best]:.4f} nats per byte)")
    return {"prose": float(found[:128].sum()), "code": float(found[128:].sum())}


if __name__ == "__main__":
    import tyro

    print(tyro.cli(main))
