"""A vision transformer in Equinox on pictures with wrong labels; which pictures hurt?

python -m examples.vit_equinox --steps 80
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.digits import CLASSES, SIZE, pictures
from ghostjax import InRunValues, value_and_dots_fn

PATCH, WIDTH, HEADS = 2, 16, 2
PATCHES = (SIZE // PATCH) ** 2


class Block(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, activation=jax.nn.gelu, key=second)

    def __call__(self, h):  # [patches, WIDTH]
        x = jax.vmap(self.norms[0])(h)
        h = h + self.attention(x, x, x)
        return h + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(h))


class ViT(eqx.Module):
    patches: eqx.nn.Linear
    positions: jax.Array
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.patches = eqx.nn.Linear(PATCH * PATCH, WIDTH, key=keys[0])
        self.positions = 0.02 * jax.random.normal(keys[1], (PATCHES, WIDTH))
        self.blocks = [Block(key) for key in keys[2:4]]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=keys[4])

    def __call__(self, picture):  # one picture, [SIZE * SIZE]
        side = SIZE // PATCH
        patches = picture.reshape(side, PATCH, side, PATCH).swapaxes(1, 2).reshape(PATCHES, -1)
        h = jax.vmap(self.patches)(patches) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(0))


def stacked(examples):
    return {key: jnp.asarray(np.stack([row[key] for row in examples])) for key in ("x", "y")}


def main(steps: int = 80, batch_size: int = 16, seed: int = 0) -> dict[str, float]:
    examples = pictures(128, seed=seed, wrong=True)
    train, val = stacked(examples), stacked(pictures(32, seed=seed + 1))
    model, optimizer = ViT(jax.random.key(seed)), optax.adam(3e-3)

    def loss_fn(model, batch):
        logits = jax.vmap(model)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    @eqx.filter_jit
    def step(model, state, values, ids):
        batch = {key: array[ids] for key, array in train.items()}
        _, grads, dots = value_and_dots_fn(loss_fn)(model, batch)  # a module, as it is
        direction = eqx.filter_grad(loss_fn)(model, val)
        values = values.add(ids, dots.result(direction).total() / batch_size)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, values

    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    values, rng = InRunValues.zeros(len(examples)), np.random.default_rng(seed)
    for _ in range(steps):
        ids = jnp.asarray(rng.choice(len(examples), batch_size, replace=False))
        model, state, values = step(model, state, values, ids)
    found = np.asarray(values.of("val"))
    is_wrong = np.array([row["domain"] == "wrong" for row in examples])
    right = jnp.argmax(jax.vmap(model)(val["x"]), -1) == val["y"]
    return {
        "wrong": float(found[is_wrong].mean()),
        "right": float(found[~is_wrong].mean()),
        "accuracy": float(right.mean()),
    }


if __name__ == "__main__":
    import tyro

    print(tyro.cli(main))
