"""The GPT-2 shape that the cost benchmarks share: 4 layers, F 256, T 128, vocabulary 2048, tied."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

LAYERS, FEATURES, HEADS, POSITIONS, VOCABULARY = 4, 256, 4, 128, 2048


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3 * FEATURES)(nn.LayerNorm()(x))
        query, key, value = jnp.split(y.reshape(*y.shape[:-1], 3 * HEADS, -1), 3, axis=-2)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(FEATURES)(y)
        y = nn.gelu(nn.Dense(4 * FEATURES)(nn.LayerNorm()(x)))
        return x + nn.Dense(FEATURES)(y)


class GPT(nn.Module):
    """(tokens, positions), both [N, T] -> logits [N, T, VOCABULARY]."""

    @nn.compact
    def __call__(self, tokens, positions):
        embed = nn.Embed(VOCABULARY, FEATURES)
        x = embed(tokens) + nn.Embed(POSITIONS, FEATURES)(positions)
        for _ in range(LAYERS):
            x = Block()(x)
        return embed.attend(nn.LayerNorm()(x))


def setup(rows: int):
    """``(row_losses, params, batch)``; ``row_losses(params, batch) -> [N]``."""
    model = GPT()
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (rows, POSITIONS + 1), np.int32)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(POSITIONS, dtype=jnp.int32), (rows, POSITIONS)),
    }

    def row_losses(params, batch):
        logits = model.apply({"params": params}, batch["tokens"], batch["positions"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.mean(losses, axis=1)

    params = model.init(jax.random.key(0), batch["tokens"][:1], batch["positions"][:1])["params"]
    return row_losses, params, batch
