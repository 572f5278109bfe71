"""A linen model that starts from pretrained weights: the token embeddings that WordLlama ships.

    ghostjax train --task examples.pretrained:task --init-from WEIGHTS --steps 64 --out runs/words

with WEIGHTS as ``python -c "import examples.pretrained as e; print(e.WEIGHTS)"`` prints it. The
names in that file are those of the model's parameters, so that nothing needs to be renamed.
"""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from ghostjax import Task

FOLDER = Path(importlib.util.find_spec("wordllama").origin).parent
WEIGHTS = FOLDER / "weights" / "l2_supercat_256.safetensors"
VOCABULARY, FEATURES, LENGTH = 32_000, 256, 12

ANIMALS = ["The dog chased a cat", "Horses and cows eat grass", "A bird sings in the tree"]
MONEY = ["The bank raised its rates", "Shares and bonds lost value", "A loan must be paid back"]


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = self.param("weight", nn.initializers.normal(0.02), (VOCABULARY, FEATURES))
        return table[tokens], table


class Words(nn.Module):
    """How well the mean of all other words of a text predicts each of them."""

    @nn.compact
    def __call__(self, tokens, mask):  # [B, T]
        words, table = Embedding(name="embedding")(tokens)
        words = words * mask[:, :, None]
        others = words.sum(1, keepdims=True) - words
        count = jnp.maximum(mask.sum(1)[:, None, None] - 1, 1)
        return (others / count) @ table.T


def encoded(text: str) -> dict[str, np.ndarray]:
    tokenizer = FOLDER / "tokenizers" / "l2_supercat_tokenizer_config.json"
    ids = tokenizers.Tokenizer.from_file(str(tokenizer)).encode(text).ids[:LENGTH]
    tokens, mask = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.float32)
    tokens[: len(ids)], mask[: len(ids)] = ids, 1
    return {"tokens": tokens, "mask": mask}


def task() -> Task:
    def examples(kind, texts):
        for number, text in enumerate(texts):
            yield {"id": f"{kind}-{number}", "domain": kind, "excerpt": text, **encoded(text)}

    def init(seed):
        rows = jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH))
        return Words().init(jax.random.key(seed), *rows)["params"]

    def row_losses(params, batch):
        logits = Words().apply({"params": params}, batch["tokens"], batch["mask"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
        return (nll * batch["mask"]).sum(1) / batch["mask"].sum(1)

    held_out = ["A cow and a horse stand by the tree", "The cat ate a bird"]
    return Task(
        train=[*examples("animals", ANIMALS), *examples("money", MONEY)],
        val={"animals": list(examples("held-out", held_out))},
        init=init,
        row_losses=row_losses,
        optimizer=optax.sgd(1.0),
        unit="nats per token",
    )
