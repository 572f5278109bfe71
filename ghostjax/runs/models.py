"""The model zoo: a GPT-2-shaped decoder for text and a classifier for arrays, and their sizes."""

import dataclasses
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

SizeName = Literal["micro", "tiny", "small", "gpt2"]


@dataclasses.dataclass(frozen=True)
class Size:
    """Layers, features, attention heads and positions, and a peak learning rate for them.

    A classifier has the layers and features alone.
    """

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

FEW_LAYERS = 2  # compiled one by one


class GPT(nn.Module):
    """A GPT-2-shaped decoder: pre-LayerNorm blocks, learned positions, output head tied to the
    token embedding, no dropout. Parameters of the blocks are stacked, so that however many there
    are, one is compiled.

    Calling it, ``tokens [N, T] -> logits [N, T, vocabulary]``. Parameters are float32; ``dtype`` is
    that of the computation, and of the logits.

    >>> import jax, jax.numpy as jnp
    >>> ids, model = jnp.zeros((1, 2), jnp.int32), GPT(SIZES["micro"])
    >>> logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), ids)
    >>> logits.shape
    (1, 2, 256)
    """

    size: Size
    vocabulary: int = 256  # tokens are bytes
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size = self.size
        embed = nn.Embed(
            self.vocabulary,
            size.features,
            embedding_init=_normal(0.02),
            dtype=self.dtype,
            name="tokens",
        )
        where = nn.Embed(
            size.positions,
            size.features,
            embedding_init=_normal(0.01),
            dtype=self.dtype,
            name="positions",
        )
        x = embed(tokens) + where(jnp.arange(tokens.shape[1]))[None]
        block = nn.remat(Block) if self.remat else Block
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=size.layers
        )(size, self.dtype, name="blocks")
        if size.layers > FEW_LAYERS or self.is_initializing():
            x, _ = blocks(x, None)
        else:
            # A loop stacks what its backward pass needs: more memory and time, if layers are few.
            stacked = self.get_variable("params", "blocks")
            for layer in range(size.layers):
                own = {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)}
                x, _ = block(size, self.dtype, parent=None).apply(own, x, None)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x))


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each added to its input [N, T, F].

    In the form of the body of a scan over layers.
    """

    size: Size
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        features, heads = self.size.features, self.size.heads
        # GPT-2 keeps the variance of the residual stream from growing with depth.
        residual = _normal(0.02 / (2 * self.size.layers) ** 0.5)

        def dense(count, init, name):
            return nn.Dense(count, kernel_init=init, dtype=self.dtype, name=name)

        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_1")(x)
        y = dense(3 * features, _normal(0.02), "qkv")(y)
        query, key, value = jnp.split(y.reshape(*y.shape[:-1], 3 * heads, -1), 3, axis=-2)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        x = x + dense(features, residual, "attention")(y)

        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_2")(x)
        y = nn.gelu(dense(4 * features, _normal(0.02), "up")(y))
        return x + dense(features, residual, "down")(y), None


class Classifier(nn.Module):
    """A perceptron with a LayerNorm behind every hidden layer.

    Calling it, ``x [N, D] -> logits [N, classes]``.
    """

    size: Size
    classes: int
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.remat(Hidden) if self.remat else Hidden
        for layer in range(self.size.layers):
            x = hidden(self.size.features, self.dtype, name=f"hidden_{layer}")(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="classes")(x)


class Hidden(nn.Module):
    """One hidden layer of the classifier."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.features, dtype=self.dtype, name="dense")(x))
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x)


def _normal(stddev: float):
    return nn.initializers.normal(stddev)
