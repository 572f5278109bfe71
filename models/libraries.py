"""The table of models of other libraries: Flax NNX, Equinox and Haiku.

Each gives (row_losses(params, batch) -> [N], params, batch).
"""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.arrays import FEATURES, POSITIONS, ROWS, activations, draw, mean_squares

WIDTH, VOCAB = 8, 11
LIBRARIES = {}


def library(build):
    LIBRARIES[build.__name__] = build
    return build


def redrawn(params):
    """Random values in the place of zeros and ones, which would hide terms."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = [
        leaf + 0.2 * draw(*leaf.shape, seed=50 + number) for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, leaves)


def token_ids():
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (ROWS, POSITIONS)))


def token_losses(logits, tokens):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1).mean(axis=(1, 2))


# Flax NNX: the parameters are split off, everything else is merged in again. A copy of it, where
# it is closed over, as generators count their calls.


def nnx_case(net, batch, loss=lambda outputs, batch: mean_squares(outputs)):
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def losses(params, batch):
        return loss(nnx.merge(graph, params, rest, copy=True)(batch), batch)

    return losses, redrawn(params), batch


@library
def nnx_mlp():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Linear(FEATURES, WIDTH, rngs=rngs),
        nnx.LayerNorm(WIDTH, rngs=rngs),
        nnx.gelu,
        nnx.Linear(WIDTH, 3, rngs=rngs),
    )
    return nnx_case(net, activations())


@library
def nnx_transformer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            # Without biases: softmax makes the gradient of the keys' bias zero but for rounding.
            self.attention = nnx.MultiHeadAttention(
                2, WIDTH, decode=False, use_bias=False, rngs=rngs
            )
            self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens))
            return self.embed.attend(jnp.tanh(self.conv(x)))

    return nnx_case(Model(nnx.Rngs(0)), token_ids(), token_losses)


@library
def nnx_cnn():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, WIDTH, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.GroupNorm(WIDTH, 2, rngs=rngs)
            self.grouped = nnx.Conv(WIDTH, WIDTH, (3, 3), feature_group_count=4, rngs=rngs)
            self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.stem(x)))
            return self.head(nnx.silu(self.grouped(x)).mean((1, 2)))

    return nnx_case(Model(nnx.Rngs(0)), draw(ROWS, 6, 6, 3))


@library
def nnx_lstm():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.RNN(nnx.LSTMCell(FEATURES, 6, rngs=rngs), rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
    )
    return nnx_case(net, activations())


def nnx_dropout_with_state():
    """With losses(params, batch, state): the generator's key and count are arguments."""
    rngs = nnx.Rngs(0, dropout=1)
    net = nnx.Sequential(
        nnx.Linear(FEATURES, WIDTH, rngs=rngs),
        nnx.Dropout(0.3, rngs=rngs),
        nnx.Linear(WIDTH, WIDTH, rngs=rngs),
        nnx.Dropout(0.3, rngs=rngs),
        nnx.Linear(WIDTH, 3, rngs=rngs),
    )
    graph, params, state = nnx.split(net, nnx.Param, ...)

    def losses(params, x, state):
        return mean_squares(nnx.merge(graph, params, state, copy=True)(x))

    return losses, redrawn(params), activations(), state


@library
def nnx_dropout():
    losses, params, x, state = nnx_dropout_with_state()
    return functools.partial(losses, state=state), params, x


@library
def nnx_scan_of_remat():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
            self.linear = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.linear(self.norm(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap
            def layers(rngs):
                return Block(rngs)

            self.layers = layers(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def run(layer, x):
                return layer(x)

            return run(self.layers, x)

    return nnx_case(Model(nnx.Rngs(0)), activations())


# Equinox: a model is written for one row. EQUINOX holds (loss of a row, params, batch).

EQUINOX = {}


def equinox(build):
    EQUINOX[build.__name__] = build

    def of_rows():
        loss, params, batch = build()
        return over_rows(loss), params, batch

    LIBRARIES[build.__name__] = of_rows
    return build


def over_rows(loss):
    return jax.vmap(loss, (None, 0))


def equinox_case(net, batch, loss=lambda net, row: jnp.mean(jnp.square(net(row)))):
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda params, row: loss(eqx.combine(params, static), row), redrawn(params), batch


def keys(count):
    return jax.random.split(jax.random.key(0), count)


@equinox
def equinox_mlp():
    class Model(eqx.Module):
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.mlp)(jax.vmap(self.norm)(x))

    net = Model(eqx.nn.LayerNorm(FEATURES), eqx.nn.MLP(FEATURES, 3, WIDTH, 2, key=keys(1)[0]))
    return equinox_case(net, activations())


@equinox
def equinox_cnn():
    class Model(eqx.Module):
        stem: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        grouped: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        head: eqx.nn.Linear

        def __call__(self, x):
            x = self.pool(jax.nn.relu(self.norm(self.stem(x))))
            return self.head(jax.nn.silu(self.grouped(x)).mean((1, 2)))

    net = Model(
        eqx.nn.Conv2d(3, WIDTH, 3, padding=1, key=keys(3)[0]),
        eqx.nn.GroupNorm(2, WIDTH),
        eqx.nn.Conv2d(WIDTH, WIDTH, 3, stride=2, groups=4, key=keys(3)[1]),
        eqx.nn.MaxPool2d(2),
        eqx.nn.Linear(WIDTH, 3, key=keys(3)[2]),
    )
    return equinox_case(net, draw(ROWS, 3, 6, 6))


@equinox
def equinox_transformer():
    """With dropout: every row comes with a key of its own."""

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.RMSNorm
        attention: eqx.nn.MultiheadAttention
        dropout: eqx.nn.Dropout

        def __call__(self, tokens, key):
            x = jax.vmap(self.embed)(tokens)
            h = jax.vmap(self.norm)(x)
            x = x + self.dropout(self.attention(h, h, h), key=key)
            return jnp.tanh(x) @ self.embed.weight.T

    net = Model(
        eqx.nn.Embedding(VOCAB, WIDTH, key=keys(2)[0]),
        eqx.nn.RMSNorm(WIDTH),
        eqx.nn.MultiheadAttention(2, WIDTH, key=keys(2)[1]),
        eqx.nn.Dropout(0.3),
    )

    def loss(net, row):
        tokens, key = row
        return token_losses(net(tokens, key)[None], tokens[None])[0]

    return equinox_case(net, (token_ids(), keys(ROWS)), loss)


@equinox
def equinox_gru():
    class Model(eqx.Module):
        cell: eqx.nn.GRUCell
        start: jax.Array

        def __call__(self, x):
            return jax.lax.scan(lambda h, x: (self.cell(x, h),) * 2, self.start, x)[1]

    return equinox_case(Model(eqx.nn.GRUCell(FEATURES, 4, key=keys(1)[0]), draw(4)), activations())


# Haiku: a function of a batch is transformed.


def haiku_case(forward, batch, loss=lambda outputs, batch: mean_squares(outputs)):
    net = hk.transform(forward)

    def losses(params, batch):
        return loss(net.apply(params, jax.random.key(5), batch), batch)

    return losses, redrawn(net.init(jax.random.key(0), batch)), batch


@library
def haiku_mlp():
    def forward(x):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Linear(WIDTH)(x))
        x = hk.dropout(hk.next_rng_key(), 0.3, jax.nn.gelu(x))
        return hk.Linear(3)(x)

    return haiku_case(forward, activations())


@library
def haiku_lstm():
    def forward(x):
        core = hk.LSTM(6)
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.BatchApply(hk.Linear(3))(x)

    return haiku_case(forward, activations())


@library
def haiku_cnn():
    def forward(x):
        x = jax.nn.relu(hk.GroupNorm(2)(hk.Conv2D(WIDTH, 3, stride=2)(x)))
        x = jax.nn.silu(hk.Conv2D(WIDTH, 3, feature_group_count=4)(x))
        return hk.Linear(3)(hk.avg_pool(x, (2, 2, 1), 1, "SAME").mean((1, 2)))

    return haiku_case(forward, draw(ROWS, 6, 6, 3))


@library
def haiku_transformer():
    def forward(tokens):
        embed = hk.Embed(VOCAB, WIDTH)
        places = hk.get_parameter("places", (POSITIONS, WIDTH), init=hk.initializers.RandomNormal())
        x = embed(tokens) + places[None]

        def block(x):
            h = hk.RMSNorm(-1)(x)
            init = hk.initializers.VarianceScaling(1.0)
            return x + hk.MultiHeadAttention(2, 4, w_init=init, with_bias=False)(h, h, h)

        x = hk.experimental.layer_stack(2)(block)(x)
        return jnp.tanh(x) @ embed.embeddings.T

    return haiku_case(forward, token_ids(), token_losses)
