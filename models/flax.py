"""The table of Flax models: each gives (row_losses(params, batch) -> [N], params, batch)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.arrays import POSITIONS, ROWS, activations, draw, mean_squares
from models.modules.table import VOCAB, ids, perturbed, row_means

WIDTH, HEADS = 8, 2
MODELS = {}
# Rows' shares of a sum over the batch; the losses of the others are meant to be averaged.
SUMMED = {"token_weighted_translation"}
# Gradients of the same operations, which XLA compiles to other roundings: of a recomputed forward
# pass; and (with jax 0.12 on a CPU) of convolutions in a loop, unless the dots are not asked for.
ROUNDED = {"gpt2_remat", "gpt2_scan_remat", "gpt2_dropout_scan_remat", "convolutional_lstm"}

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def model(build):
    MODELS[build.__name__] = build
    return build


def named(name, build, **kwargs):
    MODELS[name] = functools.partial(build, **kwargs)


class Gpt2Block(nn.Module):
    """Causal attention and a two-layer perceptron, each behind a LayerNorm."""

    dropout: float
    deterministic: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        rows, positions, _ = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        h = dense(3 * WIDTH)(nn.LayerNorm(dtype=self.dtype)(x))
        query, key, value = jnp.split(h.reshape(rows, positions, HEADS, -1), 3, axis=-1)
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / (WIDTH // HEADS) ** 0.5
        causal = jnp.tril(jnp.ones((positions, positions), bool))[None, None]
        weights = drop(jax.nn.softmax(jnp.where(causal, scores, -1e9)))
        h = jnp.einsum("bhqs,bshk->bqhk", weights, value).reshape(x.shape)
        x = x + drop(dense(WIDTH)(h))
        h = nn.gelu(dense(2 * WIDTH)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + drop(dense(WIDTH)(h)), None


class Gpt2(nn.Module):
    """GPT-2's shape: two embeddings, blocks, a last norm, and the token table again as head."""

    scan: bool = False
    remat: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, *, deterministic=True):
        embed = nn.Embed(VOCAB, WIDTH, dtype=self.dtype)
        places = self.param("positions", nn.initializers.normal(), (POSITIONS, WIDTH))
        x = embed(tokens) + places.astype(self.dtype)[None]
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        block = nn.remat(Gpt2Block) if self.remat else Gpt2Block
        if self.scan:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=2,
            )
        for _ in range(1 if self.scan else 2):
            x, _ = block(self.dropout, deterministic, self.dtype)(x, None)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


def next_token_losses(logits, tokens):
    return row_means(cross_entropy(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]))


def gpt2(**kwargs):
    net, tokens = Gpt2(**kwargs), ids(ROWS, POSITIONS)

    def losses(params, tokens):
        return next_token_losses(net.apply({"params": params}, tokens), tokens)

    return losses, perturbed(net, tokens), tokens


def gpt2_with_key(**kwargs):
    """With losses(params, tokens, key): one mask is drawn for the whole batch."""
    net, tokens = Gpt2(dropout=0.3, **kwargs), ids(ROWS, POSITIONS)

    def losses(params, tokens, key):
        logits = net.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": key})
        return next_token_losses(logits, tokens)

    return losses, perturbed(net, tokens), tokens


def gpt2_dropout(**kwargs):
    losses, params, tokens = gpt2_with_key(**kwargs)
    return functools.partial(losses, key=jax.random.key(3)), params, tokens


named("gpt2", gpt2)
named("gpt2_scan", gpt2, scan=True)
named("gpt2_remat", gpt2, remat=True)
named("gpt2_scan_remat", gpt2, scan=True, remat=True)
named("gpt2_dropout", gpt2_dropout)
named("gpt2_dropout_scan_remat", gpt2_dropout, scan=True, remat=True)


def classify(net, images, **kwargs):
    """Cross entropy of ``net`` on images with labels."""
    batch = {"images": images, "labels": ids(len(images), 1)[:, 0] % 3}

    def losses(params, batch):
        logits = net.apply({"params": params}, batch["images"], **kwargs)
        return cross_entropy(logits.astype(jnp.float32), batch["labels"])

    return losses, perturbed(net, images, **kwargs), batch


class Cnn(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, 8, (3, 3), dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, 2, dtype=self.dtype)
        x = nn.relu(norm()(conv(strides=2)(x)))
        x = nn.max_pool(x, (2, 2), (1, 1), "SAME")
        x = x + nn.silu(norm()(conv(feature_group_count=4)(x)))
        x = nn.avg_pool(x, (2, 2), (1, 1))
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


@model
def cnn(dtype=jnp.float32):
    return classify(Cnn(dtype), draw(ROWS, 6, 6, 3))


@model
def vision_transformer():
    class Vit(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(WIDTH, (2, 2), strides=2)(x).reshape(x.shape[0], -1, WIDTH)
            token = self.param("token", nn.initializers.normal(), (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
            x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
            attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
            x = x + attention(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
            return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])

    return classify(Vit(), draw(ROWS, 6, 6, 3))


class Translation(nn.Module):
    """One encoder and one decoder layer; id 0 is padding."""

    @nn.compact
    def __call__(self, batch):
        source, target = batch["source"], batch["target"]
        attention = functools.partial(nn.MultiHeadDotProductAttention, HEADS, use_bias=False)
        embed = nn.Embed(VOCAB, WIDTH)
        x, y = embed(source), nn.Embed(VOCAB, WIDTH)(target)
        x = x + attention()(nn.LayerNorm()(x), mask=nn.make_attention_mask(source > 0, source > 0))
        x = nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(x)))
        mask = nn.make_attention_mask(target > 0, target > 0)
        mask = nn.combine_masks(mask, nn.make_causal_mask(target))
        y = y + attention()(nn.LayerNorm()(y), mask=mask)
        mask = nn.make_attention_mask(target > 0, source > 0)
        y = y + attention()(nn.LayerNorm()(y), x, mask=mask)
        return embed.attend(nn.LayerNorm()(y))


def translation_batch():
    def padded(tokens, lengths):
        tokens = tokens % (VOCAB - 1) + 1
        return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)

    row = np.arange(ROWS)
    return {
        "source": padded(ids(ROWS, 4), row % 3 + 2),
        "target": padded(ids(ROWS, POSITIONS, salt=1), row % 5 + 2),
        "labels": padded(ids(ROWS, POSITIONS, salt=2), row % 5 + 2),
    }


@model
def encoder_decoder():
    net, batch = Translation(), translation_batch()

    def losses(params, batch):
        tokens = cross_entropy(net.apply({"params": params}, batch), batch["labels"])
        mask = (batch["labels"] > 0).astype(jnp.float32)
        return jnp.sum(tokens * mask, axis=1) / jnp.sum(mask, axis=1)

    return losses, perturbed(net, batch), batch


@model
def token_weighted_translation():
    """Smoothed labels, and a mean over all tokens of the batch that are not padding."""
    net, batch = Translation(), translation_batch()

    def losses(params, batch):
        labels = optax.smooth_labels(jax.nn.one_hot(batch["labels"], VOCAB), 0.1)
        tokens = optax.softmax_cross_entropy(net.apply({"params": params}, batch), labels)
        mask = (batch["labels"] > 0).astype(jnp.float32)
        return jnp.sum(tokens * mask, axis=1) / jnp.sum(mask)

    return losses, perturbed(net, batch), batch


@model
def spectral_norm():
    """The vectors of the power iteration are stored and held fixed."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, update_stats=False):
            x = nn.SpectralNorm(nn.Conv(WIDTH, (3,)))(x, update_stats=update_stats)
            x = nn.SpectralNorm(nn.Dense(WIDTH), n_steps=2)(jnp.tanh(x), update_stats=update_stats)
            return nn.Dense(3)(jnp.tanh(x))

    net, x = Net(), activations()
    state = net.init(jax.random.key(0), x)["batch_stats"]

    def losses(params, x):
        return mean_squares(net.apply({"params": params, "batch_stats": state}, x))

    return losses, perturbed(net, x), x


class StandardisedConv(nn.Module):
    """The kernel's mean is taken off and its variance divided out, per output feature."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(), shape)
        gain = self.param("scale", nn.initializers.ones, (self.features,))
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
        kernel = (kernel - mean) * jax.lax.rsqrt(variance * 18 + 1e-4) * gain[None, None, None]
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


@model
def weight_standardised_convolution():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.silu(nn.GroupNorm(2)(StandardisedConv(WIDTH)(x)))
            x = nn.WeightNorm(nn.Conv(4, (2, 2)))(x)
            return nn.Dense(3)(jnp.tanh(x).mean((1, 2)))

    return classify(Net(), draw(ROWS, 6, 6, 3))


@model
def gru_of_padded_sequences():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, batch):
            lengths = batch["lengths"]
            forward, backward = nn.RNN(nn.GRUCell(6)), nn.RNN(nn.GRUCell(6))
            x = nn.Bidirectional(forward, backward)(batch["x"], seq_lengths=lengths)
            mask = jnp.arange(POSITIONS)[None] < lengths[:, None]
            return nn.Dense(3)(x) * mask[..., None]

    net, batch = Net(), {"x": activations(), "lengths": np.array([6, 1, 4, 2, 6, 3], np.int32)}

    def losses(params, batch):
        return mean_squares(net.apply({"params": params}, batch))

    return losses, perturbed(net, batch), batch


@model
def convolutional_lstm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(nn.ConvLSTMCell(4, (2, 2)))(x))

    net, x = Net(), draw(ROWS, 3, 4, 4, 2)
    return lambda p, x: mean_squares(net.apply({"params": p}, x)), perturbed(net, x), x


@model
def adapters_of_a_frozen_model():
    """LoRA: every matrix of a frozen model is moved by a product of two small ones."""
    row_losses, frozen, batch = gpt2(scan=True)

    def adapter(path, leaf):
        if leaf.ndim < 2:
            return None
        *layers, inputs, outputs = leaf.shape
        return {"a": draw(*layers, inputs, 2) / 3, "b": draw(*layers, 2, outputs, seed=1) / 3}

    params = jax.tree_util.tree_map_with_path(adapter, frozen)

    def losses(params, batch):
        merged = jax.tree.map(
            lambda kernel, found: kernel if found is None else kernel + found["a"] @ found["b"],
            frozen,
            params,
            is_leaf=lambda leaf: leaf is None,
        )
        return row_losses(merged, batch)

    return losses, params, batch
