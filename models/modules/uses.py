"""Modules and losses that use parameters in ways of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.modules.norms import NormNet
from models.modules.table import FEATURES, activations, case, perturbed, regression, squared


@case
def time_major_layers(rows, positions, dtype):
    """The leading axis is not the rows, though it may have their number."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.swapaxes(x, 0, 1)
            x = nn.LayerNorm(dtype=dtype)(nn.Dense(FEATURES, dtype=dtype)(x))
            x = nn.Einsum((FEATURES, 4), "tbd,dk->kbt", dtype=dtype)(nn.gelu(x))
            return jnp.moveaxis(x, 1, 0)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def own_module(rows, positions, dtype):
    """Parameters of several shapes, a helper method, two outputs, a child without parameters."""

    class Own(nn.Module):
        def setup(self):
            self.gain = self.param("gain", nn.initializers.ones, (FEATURES,))
            self.mix = self.param("mix", nn.initializers.normal(), (FEATURES, FEATURES))
            self.dropout = nn.Dropout(0.5, deterministic=True)

        def scaled(self, x):
            return x * self.gain.astype(x.dtype)[None, None]

        def __call__(self, x):
            x = self.dropout(self.scaled(x))
            return jnp.sin(x @ self.mix.astype(x.dtype)), x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y, x = Own()(nn.Dense(FEATURES, dtype=dtype)(x))
            return nn.Dense(3, dtype=dtype)(x + y)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def own_module_with_custom_vjp(rows, positions, dtype):
    @jax.custom_vjp
    def straight_through(x, kernel):
        return x @ jnp.round(kernel * 8) / 8

    def forward(x, kernel):
        return straight_through(x, kernel), (x, kernel)

    def backward(residuals, cotangent):
        x, kernel = residuals
        return cotangent @ kernel.T, jnp.einsum("...i,...o->io", x, cotangent)

    straight_through.defvjp(forward, backward)

    class Quantised(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (FEATURES, 4))
            return straight_through(x.astype(dtype), kernel.astype(dtype))

    model = nn.Sequential([nn.Dense(FEATURES, dtype=dtype), Quantised(), nn.Dense(2, dtype=dtype)])
    return regression(model, activations(rows, positions, FEATURES))


@case
def two_models(rows, positions, dtype):
    """Module paths collide; parameter paths do not."""
    encoder, decoder = nn.Dense(FEATURES, dtype=dtype), nn.Dense(FEATURES, dtype=dtype)
    inputs = activations(rows, positions, FEATURES)
    params = {"encoder": perturbed(encoder, inputs), "decoder": perturbed(decoder, inputs)}

    def loss_fn(params, batch):
        hidden = nn.gelu(encoder.apply({"params": params["encoder"]}, batch))
        return squared(decoder.apply({"params": params["decoder"]}, hidden))

    return loss_fn, params, inputs


@case
def partitioned_parameters(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
            x = nn.Dense(FEATURES, kernel_init=init, dtype=dtype)(x)
            return nn.LayerNorm(dtype=dtype)(x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def jitted_apply(rows, positions, dtype):
    """A jitted function inside the loss, called twice, is traced once and cached."""
    model = NormNet(nn.LayerNorm, dtype)
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
    inputs = activations(rows, positions, FEATURES)

    def loss_fn(params, batch):
        return squared(apply(params, batch) + apply(params, -batch))

    return loss_fn, perturbed(model, inputs), inputs


@case
def unused_parameter(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(2, name="unused", dtype=dtype)(x)
            return nn.Dense(3, dtype=dtype)(x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def positions_in_a_module_of_their_own(rows, positions, dtype):
    """A table looked up without rows, added to rows in a module that owns nothing else."""

    class AddPositions(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = nn.Embed(16, FEATURES, dtype=dtype)(jnp.arange(x.shape[1]))
            return x + table[None]

    model = nn.Sequential(
        [nn.Dense(FEATURES, dtype=dtype), AddPositions(), nn.Dense(3, dtype=dtype)]
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def stopped_gradient(rows, positions, dtype):
    """The same parameters once as they are and once as a constant target."""
    model = NormNet(nn.LayerNorm, dtype)
    inputs = activations(rows, positions, FEATURES)

    def loss_fn(params, batch):
        target = model.apply({"params": jax.lax.stop_gradient(params)}, -batch)
        return squared(model.apply({"params": params}, batch) - target)

    return loss_fn, perturbed(model, inputs), inputs
