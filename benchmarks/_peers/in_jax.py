"""The probes in Flax, and the work of ``models.measured``: the models of ``in_torch`` once more."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._peers.harness import Problem
from models.measured import cnn, mlp, setup

ROWS, VAL_ROWS, POSITIONS, FEATURES, VOCABULARY = 5, 3, 5, 8, 11


class JaxProblem(Problem):
    """``row_losses(params, batch) -> [N]``."""

    def __init__(self, row_losses, params, batch, val_rows):
        self.row_losses, self.params, self.batch = row_losses, params, batch
        self.val_rows = val_rows
        self.train_rows = jax.tree.leaves(batch)[0].shape[0] - val_rows
        self.train = jax.tree.map(lambda leaf: leaf[: self.train_rows], batch)
        self.val = jax.tree.map(lambda leaf: leaf[self.train_rows :], batch)

    def mean_loss(self, params, batch):
        return self.row_losses(params, batch).mean()

    def sum_loss(self, params, batch):
        return self.row_losses(params, batch).sum()

    @functools.cached_property
    def in_float64(self):
        return jax.jit(jax.grad(self.sum_loss))

    def row_gradient(self, row):
        def wide(leaf):
            leaf = np.asarray(leaf)
            return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

        one = jax.tree.map(lambda leaf: wide(leaf[row : row + 1]), self.batch)
        jax.config.update("jax_enable_x64", True)  # kfac-jax is run by a JAX without enable_x64
        try:
            return arrays(self.in_float64(jax.tree.map(wide, self.params), one))
        finally:
            jax.config.update("jax_enable_x64", False)

    def compiled(self, function):
        """A step of ``function(params, train, val)`` that waits for what it returns."""
        args = (self.params, self.train, self.val)
        compiled = jax.jit(function).lower(*args).compile()
        return lambda: jax.block_until_ready(compiled(*args))

    def plain(self):
        return self.compiled(lambda p, train, _: jax.value_and_grad(self.mean_loss)(p, train))

    def floor(self):
        grad = jax.value_and_grad(self.mean_loss)
        return self.compiled(lambda p, train, val: (grad(p, train), grad(p, val)))


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


class Tokens(nn.Module):
    """Ids [N, T] -> [N, T, F], through a table and what stands on it."""

    kind: str

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, FEATURES)
        x = embed(ids)
        if self.kind == "positions":
            x = x + nn.Embed(POSITIONS, FEATURES)(jnp.arange(POSITIONS)[None])
        if self.kind == "bare":
            x = x + self.param("table", nn.initializers.normal(1.0), (POSITIONS, FEATURES))
        dense = nn.Dense(FEATURES)
        x = jnp.tanh(dense(x))
        if self.kind == "twice":
            x = jnp.tanh(dense(x))
        if self.kind == "tied":
            x = embed.attend(x)
        if self.kind == "product":
            x = x @ embed.embedding.T
        return x


class Dense(nn.Module):
    normed: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(FEATURES)(x)
        return nn.Dense(3)(jnp.tanh(nn.LayerNorm()(x) if self.normed else x))


class Convolution(nn.Module):
    normed: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, padding="VALID")(x)
        return jnp.tanh(nn.GroupNorm(2)(x) if self.normed else x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        zeros = jnp.zeros((x.shape[0], FEATURES), x.dtype)
        return nn.RNN(nn.OptimizedLSTMCell(FEATURES))(x, initial_carry=(zeros, zeros))


def probe(model, shape):
    def build():
        generator = np.random.default_rng(0)
        if shape == "ids":
            inputs = generator.integers(0, VOCABULARY, (ROWS + VAL_ROWS, POSITIONS), np.int32)
        else:
            inputs = generator.normal(size=(ROWS + VAL_ROWS, *shape)).astype(np.float32)
        targets = generator.normal(size=ROWS + VAL_ROWS).astype(np.float32)

        def row_losses(params, batch):
            outputs = model.apply({"params": params}, batch["inputs"])
            wanted = batch["targets"].reshape(-1, *[1] * (outputs.ndim - 1))
            return jnp.square(outputs - wanted).reshape(len(wanted), -1).mean(1)

        params = model.init(jax.random.key(0), jnp.asarray(inputs))["params"]
        params = jax.tree.map(  # no scale of one, no bias of zero
            lambda leaf: leaf + 0.2 * generator.normal(size=leaf.shape).astype(np.float32), params
        )
        batch = {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(targets)}
        return JaxProblem(row_losses, params, batch, VAL_ROWS)

    return build


def probes():
    sequence, image = (POSITIONS, FEATURES), (6, 6, 3)
    return {
        "dense layers, one position": probe(Dense(), (FEATURES,)),
        "dense layers": probe(Dense(), sequence),
        "LayerNorm": probe(Dense(normed=True), sequence),
        "embedding": probe(Tokens("embedding"), "ids"),
        "embedding tied to the head": probe(Tokens("tied"), "ids"),
        "head by x @ table.T": probe(Tokens("product"), "ids"),
        "layer called twice": probe(Tokens("twice"), "ids"),
        "position look-up for all rows": probe(Tokens("positions"), "ids"),
        "position table as a parameter": probe(Tokens("bare"), "ids"),
        "convolution": probe(Convolution(), image),
        "GroupNorm": probe(Convolution(normed=True), image),
        "LSTM": probe(Recurrent(), sequence),
    }


def gpt(tied):
    return JaxProblem(*setup(8, layers=2, tied=tied), val_rows=4)


def works():
    return {
        "GPT-2 shape, tied head": lambda: gpt(tied=True),
        "GPT-2 shape, head of its own": lambda: gpt(tied=False),
        "MLP with LayerNorms": lambda: JaxProblem(*mlp(128), val_rows=64),
        "CNN without norms": lambda: JaxProblem(*cnn(80, normed=False), val_rows=16),
    }
