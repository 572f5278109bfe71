"""Layers in loops, recomputed, vectorized, compiled by themselves, and in branches."""

import flax.linen as nn
import jax.numpy as jnp

from models.modules.table import FEATURES, VOCAB, activations, case, language, regression


@case
def shared_three_times(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(FEATURES, dtype=dtype)
            norm = nn.LayerNorm(dtype=dtype)
            conv = nn.Conv(FEATURES, (3,), dtype=dtype)
            for _ in range(3):
                x = x + conv(nn.gelu(dense(norm(x))))
            return x

    return regression(Net(), activations(rows, positions, FEATURES))


class Block(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.Dense(FEATURES, dtype=self.dtype)(nn.gelu(nn.Dense(12, dtype=self.dtype)(h)))
        return x + h, None


def layers_case(name, wrap, length=3, axis=0):
    def build(rows, positions, dtype):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(FEATURES, dtype=dtype)(x)
                stack = nn.scan(
                    wrap(Block),
                    variable_axes={"params": axis},
                    split_rngs={"params": True},
                    length=length,
                )
                x, _ = stack(dtype)(x, None)
                return nn.LayerNorm(dtype=dtype)(x)

        return regression(Net(), activations(rows, positions, FEATURES))

    build.__name__ = name
    return case(build)


layers_case("scan_over_layers", lambda block: block)
layers_case("scan_over_layers_axis_1", lambda block: block, axis=1)
layers_case("scan_of_remat", nn.remat)


@case
def scan_with_shared_weights(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Block, variable_broadcast="params", split_rngs={"params": False}, length=3
            )
            return stack(dtype)(x, None)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def scan_with_shared_weights_inside_scan_over_layers(rows, positions, dtype):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.RNN(nn.GRUCell(FEATURES, dtype=dtype))(x)
            return nn.LayerNorm(dtype=dtype)(h).astype(x.dtype), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Recurrent, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return stack()(x, None)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def scan_of_tied_table(rows, positions, dtype):
    class Level(nn.Module):
        @nn.compact
        def __call__(self, x, tokens):
            embed = nn.Embed(VOCAB, FEATURES, dtype=dtype)
            x = nn.LayerNorm(dtype=dtype)(x + embed(tokens))
            return x, embed.attend(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            stack = nn.scan(
                Level,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=2,
            )
            x = jnp.zeros((*tokens.shape, FEATURES), dtype)
            return stack()(x, tokens)[1].sum(0)

    return language(Net(), rows, positions)


@case
def remat(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x, _ = nn.remat(Block)(dtype)(x)
            return x

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def vmap_ensemble(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=1,
                axis_size=3,
            )
            return members(dtype)(x)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def vmap_over_positions_with_shared_weights(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.vmap(
                Block,
                variable_axes={"params": None},
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )
            return shared(dtype)(x)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def nn_jit(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x, _ = nn.jit(Block)(dtype)(x)
            return x

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def remat_scan(rows, positions, dtype):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(dtype)(x)[0]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat_scan(Plain, lengths=(2, 2))()(x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def branches(rows, positions, dtype):
    """One branch runs; the parameters of the other get zeros."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            left, right = nn.Dense(FEATURES, dtype=dtype), nn.Dense(FEATURES, dtype=dtype)
            if self.is_initializing():
                return left(x) + right(x)
            x = nn.cond(x.sum() > -1e9, lambda m, x: left(x), lambda m, x: right(x), self, x)
            return nn.cond(x.sum() > -1e9, lambda m, x: left(x), lambda m, x: right(x), self, x)

    return regression(Net(), activations(rows, positions, FEATURES))
