"""LoRA on pretrained token embeddings, those that WordLlama ships; which texts help?

    python -m examples.lora --steps 40

The pretrained table is frozen: it is a constant of the loss. Dots are for the two small factors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from examples.pretrained import ANIMALS, FEATURES, MONEY, VOCABULARY, WEIGHTS, encoded
from ghostjax import InRunValues, directions, value_and_dots_fn

RANK, HELD_OUT = 4, ["A cow and a horse stand by the tree", "The cat ate a bird"]


def main(steps: int = 40, seed: int = 0) -> dict[str, float]:
    frozen = jnp.asarray(safetensors.numpy.load_file(WEIGHTS)["embedding.weight"], jnp.float32)
    lora = {
        "a": jax.random.normal(jax.random.key(seed), (VOCABULARY, RANK)) / RANK,
        "b": jnp.zeros((RANK, FEATURES)),
    }
    texts = [*ANIMALS, *MONEY]
    train, val = (
        {key: np.stack([row[key] for row in rows]) for key in ("tokens", "mask")}
        for rows in (list(map(encoded, texts)), list(map(encoded, HELD_OUT)))
    )
    optimizer = optax.adamw(1e-3)

    def loss_fn(lora, batch):
        """How well the mean of all other words of a text predicts each of them."""
        tokens, mask = batch["tokens"], batch["mask"]
        words = (frozen[tokens] + lora["a"][tokens] @ lora["b"]) * mask[:, :, None]
        others = words.sum(1, keepdims=True) - words
        context = others / jnp.maximum(mask.sum(1)[:, None, None] - 1, 1)
        nll = optax.softmax_cross_entropy_with_integer_labels(context @ frozen.T, tokens)
        return jnp.mean((nll * mask).sum(1) / mask.sum(1))

    @jax.jit
    def step(lora, state, values):
        _, grads, dots = value_and_dots_fn(loss_fn)(lora, train)
        val_loss, val_grads = jax.value_and_grad(loss_fn)(lora, val)
        direction = directions.through_optimizer(optimizer, state, lora, grads, val_grads)
        values = values.add(jnp.arange(len(texts)), dots.result(direction).total() / len(texts))
        updates, state = optimizer.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, values, val_loss

    state, values, losses = optimizer.init(lora), InRunValues.zeros(len(texts)), []
    for _ in range(steps):
        lora, state, values, val_loss = step(lora, state, values)
        losses.append(float(val_loss))
    for value, text in sorted(zip(values.of("val").tolist(), texts), reverse=True):
        print(f"{value:9.5f}  {text}")
    found = np.asarray(values.of("val"))
    return {
        "animals": float(found[: len(ANIMALS)].mean()),
        "money": float(found[len(ANIMALS) :].mean()),
        "val_loss_before": losses[0],
        "val_loss_after": losses[-1],
    }


if __name__ == "__main__":
    import tyro

    print(tyro.cli(main))
