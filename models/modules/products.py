"""Products and look-ups: what owns a kernel or a table, once and twice."""

import flax.linen as nn
import jax.numpy as jnp

from models.modules.table import (
    FEATURES,
    VOCAB,
    activations,
    case,
    ids,
    language,
    perturbed,
    regression,
    squared,
)


@case
def dense_general_axes(rows, positions, dtype):
    model = nn.Sequential(
        [
            nn.DenseGeneral((3, 4), dtype=dtype),
            nn.gelu,
            nn.DenseGeneral((5, 2), axis=(-1, -2), dtype=dtype),
        ]
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def dense_general_batch_dims(rows, positions, dtype):
    class PerPosition(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.moveaxis(x, 1, 0)  # positions in front: each has a kernel of its own
            return jnp.moveaxis(nn.DenseGeneral(3, batch_dims=(0,), dtype=dtype)(x), 0, 1)

    return regression(PerPosition(), activations(rows, positions, FEATURES))


@case
def einsum_heads(rows, positions, dtype):
    model = nn.Sequential(
        [
            nn.Einsum((2, FEATURES, 4), "btd,hdk->bhtk", dtype=dtype),
            nn.gelu,
            nn.Einsum((2, 4, 3), "bhtk,hko->bto", use_bias=False, dtype=dtype),
        ]
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def einsum_ellipsis_and_batch_letter(rows, positions, dtype):
    model = nn.Sequential(
        [
            nn.Einsum((FEATURES, 2, 4), "...d,dhk->...hk", dtype=dtype),
            nn.gelu,
            nn.Einsum((2, 4, 3), "...hk,hko->...ho", dtype=dtype),
        ]
    )
    return regression(model, activations(rows, positions, FEATURES))


class TiedHead(nn.Module):
    """Embed, a block, and the same table again as output head."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, FEATURES, dtype=self.dtype)
        x = embed(tokens)
        x = x + nn.Dense(FEATURES, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return embed.attend(x)


@case
def tied_head(rows, positions, dtype):
    return language(TiedHead(dtype), rows, positions)


@case
def embed_and_head(rows, positions, dtype):
    model = nn.Sequential([nn.Embed(VOCAB, FEATURES, dtype=dtype), nn.Dense(VOCAB, dtype=dtype)])
    return language(model, rows, positions)


@case
def embed_of_rank_one(rows, positions, dtype):
    table = nn.Embed(VOCAB, FEATURES, dtype=dtype)

    def loss_fn(params, batch):
        return squared(table.apply({"params": params}, batch))

    batch = ids(rows, 1)[:, 0]
    return loss_fn, perturbed(table, batch), batch


@case
def embed_out_of_range(rows, positions, dtype):
    table = nn.Embed(VOCAB, FEATURES, dtype=dtype)

    def loss_fn(params, batch):
        return squared(jnp.nan_to_num(table.apply({"params": params}, batch)))

    batch = ids(rows, positions) * 2 - 4  # negative ids count from the end; too large: no gradient
    return loss_fn, perturbed(table, batch), batch


@case
def convolutions(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), strides=2, dtype=dtype)(x)
            x = nn.gelu(nn.GroupNorm(2, dtype=dtype)(x))
            x = nn.Conv(8, (3, 3), feature_group_count=4, dtype=dtype)(x)
            x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), dtype=dtype)(nn.gelu(x))
            return nn.Dense(3, dtype=dtype)(x.mean((1, 2)))

    return regression(Net(), activations(rows, 6, 6, 3))


@case
def attention(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            return nn.MultiHeadDotProductAttention(2, normalize_qk=True, dtype=dtype)(x, mask=mask)

    return regression(Net(), activations(rows, positions, FEATURES))
