"""The GPT-2 shape that costs are measured on: 4 layers, F 256, T 128, vocabulary 2048, tied."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

LAYERS, FEATURES, HEADS, POSITIONS, VOCABULARY = 4, 256, 4, 128, 2048


class Block(nn.Module):
    heads: int = HEADS

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        y = nn.Dense(3 * features)(nn.LayerNorm()(x))
        query, key, value = jnp.split(y.reshape(*y.shape[:-1], 3 * self.heads, -1), 3, axis=-2)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(features)(y)
        y = nn.gelu(nn.Dense(4 * features)(nn.LayerNorm()(x)))
        return x + nn.Dense(features)(y)


class GPT(nn.Module):
    """(tokens, positions), both [N, T] -> logits [N, T, vocabulary].

    ``stacked``: "unrolled", or a loop over stacked layers, "scan", or "scan+remat".
    ``placed``: where activations are to be on a mesh, between layers that are unrolled.
    ``tied``: whether the head is the table of the tokens.
    """

    layers: int
    positions: int
    stacked: str = "unrolled"
    placed: NamedSharding | None = None
    features: int = FEATURES
    heads: int = HEADS
    vocabulary: int = VOCABULARY
    tied: bool = True

    @nn.compact
    def __call__(self, tokens, positions):
        def place(x):
            return x if self.placed is None else jax.lax.with_sharding_constraint(x, self.placed)

        embed = nn.Embed(self.vocabulary, self.features)
        x = place(embed(tokens) + nn.Embed(self.positions, self.features)(positions))
        if self.stacked == "unrolled":
            for _ in range(self.layers):
                x = place(Block(self.heads)(x))
        else:
            block = nn.remat(Block, prevent_cse=False) if "remat" in self.stacked else Block
            x, _ = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )(block(self.heads), x, None)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, use_bias=False)(x)


def setup(
    rows: int,
    *,
    layers: int | None = None,
    positions: int | None = None,
    stacked: str = "unrolled",
    placed: NamedSharding | None = None,
    vocabulary: int = VOCABULARY,
    **sizes,
):
    """``(row_losses, params, batch)``; ``row_losses(params, batch) -> [N]``."""
    layers, positions = layers or LAYERS, positions or POSITIONS
    model = GPT(layers, positions, stacked, vocabulary=vocabulary, **sizes)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocabulary, (rows, positions + 1), np.int32)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32), (rows, positions)),
    }

    def row_losses(params, batch):
        on_mesh = model.clone(placed=placed)
        logits = on_mesh.apply({"params": params}, batch["tokens"], batch["positions"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.mean(losses, axis=1)

    first = batch["tokens"][:1], batch["positions"][:1]
    params = jax.jit(model.init)(jax.random.key(0), *first)["params"]
    return row_losses, params, batch


class NormedMLP(nn.Module):
    """784-512-512-10 with LayerNorms."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.LayerNorm()(nn.Dense(512)(x)))
        return nn.Dense(10)(x)


def mlp(rows: int):
    """The same for ``NormedMLP``."""
    generator = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(generator.normal(size=(rows, 784)), jnp.float32),
        "y": jnp.asarray(generator.integers(0, 10, rows, np.int32)),
    }
    model = NormedMLP()

    def row_losses(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return row_losses, jax.jit(model.init)(jax.random.key(0), batch["x"])["params"], batch


class ConvNet(nn.Module):
    """Images [N, 32, 32, 3] -> 10 classes: three convolutions, each with a GroupNorm or without."""

    normed: bool = True

    @nn.compact
    def __call__(self, x):
        for features in (32, 64, 128):
            x = nn.Conv(features, (3, 3), strides=2)(x)
            x = nn.relu(nn.GroupNorm(8)(x) if self.normed else x)
        return nn.Dense(10)(x.mean((1, 2)))


def cnn(rows: int, *, normed: bool = True):
    """The same for ``ConvNet``."""
    generator = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(generator.normal(size=(rows, 32, 32, 3)), jnp.float32),
        "y": jnp.asarray(generator.integers(0, 10, rows, np.int32)),
    }
    model = ConvNet(normed)

    def row_losses(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return row_losses, jax.jit(model.init)(jax.random.key(0), batch["x"][:1])["params"], batch
