"""The model zoo: one GPT-2-shaped module and its sizes."""

import dataclasses
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

VOCABULARY = 256  # tokens are bytes

SizeName = Literal["micro", "tiny", "small", "gpt2"]


@dataclasses.dataclass(frozen=True)
class Size:
    """Layers, features, attention heads and positions of a GPT, and a peak learning rate for it."""

    layers: int
    features: int
    heads: int
    positions: int
    learning_rate: float


SIZES: dict[SizeName, Size] = {
    "micro": Size(layers=2, features=16, heads=2, positions=32, learning_rate=5e-3),
    "tiny": Size(layers=2, features=64, heads=2, positions=64, learning_rate=5e-3),
    "small": Size(layers=6, features=384, heads=6, positions=256, learning_rate=1e-3),
    "gpt2": Size(layers=12, features=768, heads=12, positions=1024, learning_rate=6e-4),
}
assert tuple(SIZES) == get_args(SizeName)


class GPT(nn.Module):
    """A GPT-2-shaped decoder: pre-LayerNorm blocks, learned positions, output head tied to the
    token embedding, no dropout.

    Calling it, ``tokens [N, T] -> logits [N, T, 256]``, in float32.

    >>> import jax, jax.numpy as jnp
    >>> ids, model = jnp.zeros((1, 2), jnp.int32), GPT(SIZES["micro"])
    >>> logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), ids)
    >>> logits.shape
    (1, 2, 256)
    """

    size: Size

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size = self.size
        embed = nn.Embed(VOCABULARY, size.features, embedding_init=_normal(0.02), name="tokens")
        where = nn.Embed(
            size.positions, size.features, embedding_init=_normal(0.01), name="positions"
        )
        x = embed(tokens) + where(jnp.arange(tokens.shape[1]))[None]
        for layer in range(size.layers):
            x = Block(size, name=f"block_{layer}")(x)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each added to its input [N, T, F]."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, heads = self.size.features, self.size.heads
        # GPT-2 keeps the variance of the residual stream from growing with depth.
        residual = _normal(0.02 / (2 * self.size.layers) ** 0.5)

        y = nn.LayerNorm(epsilon=1e-5, name="norm_1")(x)
        y = nn.Dense(3 * features, kernel_init=_normal(0.02), name="qkv")(y)
        query, key, value = jnp.split(y.reshape(*y.shape[:-1], 3 * heads, -1), 3, axis=-2)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(features, kernel_init=residual, name="attention")(y)

        y = nn.LayerNorm(epsilon=1e-5, name="norm_2")(x)
        y = nn.gelu(nn.Dense(4 * features, kernel_init=_normal(0.02), name="up")(y))
        return x + nn.Dense(features, kernel_init=residual, name="down")(y)


def _normal(stddev: float):
    return nn.initializers.normal(stddev)
