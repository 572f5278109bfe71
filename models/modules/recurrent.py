"""Recurrent cells, whose parameters are used at every position."""

import flax.linen as nn
import jax.numpy as jnp

from models.modules.table import FEATURES, activations, case, regression


def recurrent_case(name, cell):
    def build(rows, positions, dtype):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.RNN(cell(6, dtype=dtype))(x)
                return nn.Dense(3, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))

        return regression(Net(), activations(rows, positions, FEATURES))

    build.__name__ = name
    return case(build)


recurrent_case("lstm", nn.LSTMCell)
recurrent_case("optimized_lstm", nn.OptimizedLSTMCell)
recurrent_case("gru", nn.GRUCell)


@case
def bidirectional(rows, positions, dtype):
    model = nn.Bidirectional(
        nn.RNN(nn.GRUCell(5, dtype=dtype)), nn.RNN(nn.OptimizedLSTMCell(4, dtype=dtype))
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def recurrent_time_major(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.swapaxes(x, 0, 1)
            x = nn.RNN(nn.GRUCell(6, dtype=dtype), time_major=True)(x)
            x = nn.LayerNorm(dtype=dtype)(nn.Dense(FEATURES, dtype=dtype)(x))
            return jnp.swapaxes(x, 0, 1)

    return regression(Net(), activations(rows, positions, FEATURES))
