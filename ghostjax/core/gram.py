"""The Gram route: inner products of weight gradients over pairs of positions.

< dW_b , dW_v > = sum_ts (x_bt . x_vs) (c_bt . c_vs)
    |dW_b|^2      = sum_ts (x_bt . x_bs) (c_bt . c_bs)
"""

import jax
import jax.numpy as jnp

from ghostjax.core.meeting import wide_dtype
from ghostjax.core.routes import Sizes, operations_per_number
from ghostjax.core.row_blocks import map_rows


def gram_costs_less(train: tuple[int, int, int], val: tuple[int, int, int]) -> bool:
    """Whether einsum("bti,bto,vsi,vso->b") is cheaper over pairs of positions than multiplied out.

    Gram products over all pairs of positions take b t v s (i + o) multiplications. Multiplied out,
    the validation total takes v s i o and its product with the training rows b t i o.
    """
    (b, t, i), (v, s, o) = train, val
    return b * t * v * s * (i + o) < (b * t + v * s) * i * o


def gram_dots(inputs, cotangents, val_inputs, val_cotangents) -> jax.Array:
    """einsum("bti,bto,vsi,vso->b") over pairs of positions, [B]; sums in float32 or wider."""
    wide = wide_dtype(inputs, cotangents)
    operands = (inputs, val_inputs), (cotangents, val_cotangents)
    grams = [
        jnp.einsum("btf,vsf->btvs", first.astype(wide), second.astype(wide))
        for first, second in operands
    ]
    return jnp.einsum("btvs,btvs->b", *grams)


def squares_cost_less(sizes: Sizes) -> bool:
    """Whether a row's squared norm is cheaper over pairs of its positions than by its gradient.

    Row by row, a weight gradient takes t i o multiplications, and is written and read once.
    """
    t, i, o = sizes.t, sizes.i, sizes.o
    return t * t * (i + o) < i * o * (t + 2 * operations_per_number())


def gram_squares(inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
    """einsum("bti,bto,bsi,bso->b"), [B]; sums in float32 or wider.

    One row after another, unless all their pairs take no more memory than the factors.
    """
    wide = wide_dtype(inputs, cotangents)
    _, positions, features = inputs.shape

    def of_row(pair):
        grams = [jnp.matmul(array, array.T, precision="highest") for array in pair]
        return jnp.sum(grams[0] * grams[1])

    pair = inputs.astype(wide), cotangents.astype(wide)
    if positions == 1:
        return jnp.prod(jnp.stack([jnp.sum(jnp.square(array), axis=(1, 2)) for array in pair]), 0)
    if positions <= features:
        return jax.vmap(of_row)(pair)
    return map_rows(of_row, pair)
