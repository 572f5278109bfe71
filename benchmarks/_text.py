"""Prose that comes with Python, noise for it, and a small model of the next byte."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax.runs.data.builtin import cut, default_documents

POSITIONS, CONTEXT = 64, 4
WORD = 4  # bytes of what boilerplate repeats


class Data(NamedTuple):
    """Tokens [n, POSITIONS + 1], bytes; val and test are from topics that train has not."""

    train: Any
    val: Any
    test: Any
    is_noise: Any  # bool, of every training row


def draw(seed: int, noise: str, share: float, val_rows: int, test_rows: int) -> Data:
    """A random choice of validation and test rows, and of the training rows that become noise.

    noise: "shuffled", the row's own bytes in random order; or "boilerplate", four of them over and
    over again.
    """
    generator = np.random.default_rng(seed)
    held = _prose()[1]
    held = held[generator.permutation(len(held))[: val_rows + test_rows]]
    train, is_noise = noisy(generator, noise, share)
    return Data(train, held[:val_rows], held[val_rows:], is_noise)


def held_out(*sizes: int) -> list[np.ndarray]:
    """Held-out rows in parts that have no row in common, the same for every seed; the last part
    is what is left."""
    held = _prose()[1]
    order = np.random.default_rng(0).permutation(len(held))
    return np.split(held[order], np.cumsum(sizes))


def noisy(
    generator: np.random.Generator, noise: str, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The training rows, some of which become noise, and whether each has."""
    train = _prose()[0].copy()
    is_noise = np.zeros(len(train), bool)
    count = round(share * len(train))
    is_noise[generator.choice(len(train), count, replace=False)] = True
    for place in np.flatnonzero(is_noise):
        if noise == "shuffled":
            train[place] = generator.permutation(train[place])
        else:
            start = generator.integers(POSITIONS - WORD)
            train[place] = np.resize(train[place][start : start + WORD], POSITIONS + 1)
    return train, is_noise


@functools.cache
def _prose() -> tuple[np.ndarray, np.ndarray]:
    documents, held_out = default_documents(16 * (POSITIONS + 1))
    train = [document for document in documents if document.domain == "prose"]
    return _rows(train), _rows(held_out["prose"])


def _rows(documents) -> np.ndarray:
    size = POSITIONS + 1
    pieces = [piece for document in documents for piece in cut(document.text, size)]
    return np.array([np.resize(np.frombuffer(piece, np.uint8), size) for piece in pieces])


class NextByte(nn.Module):
    """[N, T] bytes -> logits [N, T, 256], each from the last ``CONTEXT`` bytes.

    It learns within hundreds of steps what a transformer learns in thousands.
    """

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 24, name="embed")(tokens)
        x = jnp.pad(x, ((0, 0), (CONTEXT - 1, 0), (0, 0)))
        places = jnp.arange(tokens.shape[1])[:, None] + jnp.arange(CONTEXT)
        x = x[:, places].reshape(*tokens.shape, -1)
        x = nn.gelu(nn.LayerNorm(name="norm")(nn.Dense(96, name="hidden")(x)))
        return nn.Dense(256, name="head")(x)


MODEL = NextByte()


def init(seed: Any) -> Any:
    return MODEL.init(jax.random.key(seed), jnp.zeros((1, POSITIONS), jnp.int32))["params"]


def row_losses(params: Any, rows: jax.Array) -> jax.Array:
    tokens = rows.astype(jnp.int32)
    logits = MODEL.apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(1)


def mean_loss(params: Any, rows: jax.Array) -> jax.Array:
    return row_losses(params, rows).mean()
