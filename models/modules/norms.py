"""Norms of Flax."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from models.modules.table import FEATURES, activations, case, perturbed, regression, squared


class NormNet(nn.Module):
    """A norm between two Linear layers, twice."""

    norm: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(FEATURES, dtype=self.dtype)(x)
            x = nn.gelu(self.norm(dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x)


def norm_case(name, norm, shape=lambda n, t: (n, t, FEATURES), model=NormNet):
    def build(rows, positions, dtype):
        return regression(model(norm, dtype), activations(*shape(rows, positions)))

    build.__name__ = name
    return case(build)


norm_case("layernorm_rank_2", nn.LayerNorm, lambda n, t: (n, FEATURES))
norm_case("layernorm_rank_3", nn.LayerNorm)
norm_case("layernorm_rank_4", nn.LayerNorm, lambda n, t: (n, t, 2, FEATURES))
norm_case("layernorm_no_bias", functools.partial(nn.LayerNorm, use_bias=False))
norm_case("layernorm_no_scale", functools.partial(nn.LayerNorm, use_scale=False))
norm_case("layernorm_epsilon", functools.partial(nn.LayerNorm, epsilon=0.1))
norm_case("layernorm_exact_variance", functools.partial(nn.LayerNorm, use_fast_variance=False))
norm_case("layernorm_two_reduced", functools.partial(nn.LayerNorm, reduction_axes=(-2, -1)))
norm_case(
    "layernorm_two_features",
    functools.partial(nn.LayerNorm, reduction_axes=(-2, -1), feature_axes=(-2, -1)),
)
norm_case(
    "layernorm_features_swapped",
    functools.partial(nn.LayerNorm, reduction_axes=(-2, -1), feature_axes=(-1, -2)),
)
norm_case("rmsnorm", nn.RMSNorm)
norm_case("groupnorm", functools.partial(nn.GroupNorm, num_groups=2))
norm_case("instancenorm", nn.InstanceNorm, lambda n, t: (n, t + 5, FEATURES))


@case
def layernorm_masked(rows, positions, dtype):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = jnp.arange(FEATURES) < 5
            return nn.Dense(3, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x, mask=mask))

    return regression(Masked(), activations(rows, positions, FEATURES))


@case
def batchnorm_in_evaluation(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(FEATURES, dtype=dtype)(x)
            return nn.BatchNorm(use_running_average=True, dtype=dtype)(x)

    inputs = activations(rows, positions, FEATURES)
    statistics = {"mean": jnp.linspace(-1, 1, FEATURES), "var": jnp.linspace(0.5, 2, FEATURES)}

    def loss_fn(params, batch):
        state = {"params": params, "batch_stats": {"BatchNorm_0": statistics}}
        return squared(Net().apply(state, batch))

    return loss_fn, perturbed(Net(), inputs), inputs
