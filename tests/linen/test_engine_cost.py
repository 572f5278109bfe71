"""What the engine's program is: that it lowers for accelerators, its FLOPs and its memory."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ghostjax import GradDotProdEngine
from models.modules import CASES
from models.modules.loops import Block
from models.modules.table import activations, perturbed, squared

B, V = 4, 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_lowers_for_accelerators(dtype, standard_promotion):
    loss_fn, params, batch = CASES["tied_head"](7, 7, dtype)
    engine = GradDotProdEngine(loss_fn, val_batch_size=3)
    exported = jax.export.export(jax.jit(engine), platforms=["cpu", "tpu", "cuda"])(params, batch)
    assert exported.platforms == ("cpu", "tpu", "cuda")


def test_cost_is_one_forward_shaped_product_more():
    """Against a plain step of all N rows: one more product on the B rows for each kernel."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = x + nn.Dense(64)(nn.relu(x))
            return x

    batch = activations(32, 64, 64)
    params = perturbed(Net(), batch)

    def loss_fn(params, batch):
        return squared(Net().apply({"params": params}, batch))

    def flops(function):
        return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"]

    plain = flops(jax.value_and_grad(lambda params, batch: loss_fn(params, batch).mean()))
    engine = flops(GradDotProdEngine(loss_fn, val_batch_size=8))
    product = 3 * 2 * 24 * 64 * 64 * 64
    assert engine <= 1.02 * (plain + product)


@pytest.mark.slow
def test_scanned_layers_carry_no_records():
    """Memory of a scanned stack grows with its length as that of a plain step does."""

    class Net(nn.Module):
        length: int

        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.length,
            )
            return stack(jnp.float32)(x, None)[0]

    def temporary(length, wrap):
        model, batch = Net(length), activations(32, 64, 8)

        def loss_fn(params, batch):
            return squared(model.apply({"params": params}, batch))

        params = perturbed(model, batch)
        compiled = jax.jit(wrap(loss_fn)).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def growth(wrap):
        return temporary(12, wrap) - temporary(4, wrap)

    plain = growth(lambda loss_fn: jax.grad(lambda p, b: loss_fn(p, b).mean()))
    engine = growth(lambda loss_fn: GradDotProdEngine(loss_fn, val_batch_size=8))
    assert engine <= 1.25 * plain + 2**16


def test_convolutions_of_many_rows_are_not_unfolded():
    """The windows of all rows would take the memory of their inputs times a window's places."""
    params, x = {"w": jnp.ones((5, 5, 2, 2))}, jnp.ones((B + V, 6, 6, 2))

    def losses(params, x):
        names = ("NHWC", "HWIO", "NHWC")
        found = jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=names
        )
        return jnp.mean(jnp.square(found), axis=(1, 2, 3))

    text = jax.jit(GradDotProdEngine(losses, val_batch_size=V)).lower(params, x).as_text()
    shapes = [shape.split("x") for shape in re.findall(r"tensor<([\dx]+)xf32>", text)]
    assert max(math.prod(map(int, shape)) for shape in shapes) == x.size
