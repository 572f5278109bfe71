"""Kernels' gradients by rows: a convolution is a product with the windows it moves over.

dW_b     = sum_t x_bt c_bt^T                  x_bt: the window of b's inputs at t, unfolded
|dW_b|^2 = sum_io (sum_t x_bti c_bto)^2
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax.core.gram import squares_cost_less
from ghostjax.core.meeting import Meeting, wide_dtype
from ghostjax.core.place_rules import Rows
from ghostjax.core.routes import Sizes
from ghostjax.core.row_blocks import map_rows


def is_unfolded(meeting: Meeting) -> bool:
    """Whether this is a convolution of rows with a kernel of parameters."""
    eqn = meeting.eqn
    if eqn is None or eqn.primitive.name != "conv_general_dilated":
        return False
    dims, (rows,) = eqn.params["dimension_numbers"], meeting.rows
    return (
        set(meeting.moving.values()) == {(1,)}
        and len(meeting.moving) == 1
        and isinstance(rows, Rows)
        and (rows.axis, rows.outer, rows.inner) == (dims.out_spec[0], 1, 1)
        and eqn.params["batch_group_count"] == 1
        and not _is_empty(eqn)
        and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    )


def as_product(meeting: Meeting, function: Callable[..., list]) -> Callable[..., list]:
    """``function``, the operation of a meeting of one row: where it is a convolution with a kernel
    of parameters, as the product that it is.

    Of one row, XLA's CPU backend takes much longer for the gradient of a convolution. For several
    rows, each of which has a gradient of its own, it is one of grouped features; where these are
    split over devices, XLA makes wrong numbers (jax 0.10 and 0.12).
    """
    eqn = meeting.eqn
    if (
        eqn is None
        or eqn.primitive.name != "conv_general_dilated"
        or set(meeting.moving.values()) != {(1,)}
        or eqn.params["batch_group_count"] != 1
        or _is_empty(eqn)
    ):
        return function
    return lambda operands: [_product(eqn.params, function, *operands)]


def _is_empty(eqn: Any) -> bool:
    """Whether there is no window, or nothing in it."""
    return any(0 in var.aval.shape for var in (*eqn.invars, *eqn.outvars))


def _product(params: dict[str, Any], function: Callable[..., list], inputs, kernel) -> jax.Array:
    dims, groups = params["dimension_numbers"], params["feature_group_count"]
    (output,) = jax.eval_shape(function, [inputs, kernel])
    places = [output.shape[axis] for axis in dims.out_spec[2:]]
    window = [kernel.shape[axis] for axis in dims.rhs_spec[2:]]
    inputs = jnp.transpose(inputs, (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1]))
    kernel = jnp.transpose(kernel, (*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0]))
    windows = jax.vmap(lambda x: _windows(x, params, window, places))(inputs)
    found = jnp.einsum(
        "...kgi,kigo->...go",
        windows.reshape(*windows.shape[:-1], groups, -1),
        kernel.reshape(math.prod(window), kernel.shape[-2], groups, -1),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    order = np.argsort([dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1]])
    return jnp.transpose(found.reshape(*found.shape[:-2], -1), order)


def conv_squares(meeting: Meeting, inputs: jax.Array, cotangent: jax.Array) -> jax.Array:
    """[B], in float32 or wider.

    As many rows at a time as take a quarter of what inputs and outputs of all do, at least one; of
    a number that divides B, as a rest would be copied.
    """
    eqn, wide = meeting.eqn, wide_dtype(inputs, cotangent)
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel = eqn.invars[1].aval.shape
    window = [kernel[axis] for axis in dims.rhs_spec[2:]]
    inputs = jnp.transpose(inputs, (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1]))
    cotangent = jnp.transpose(cotangent, (dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1]))
    places = cotangent.shape[1:-1]
    sizes = Sizes(
        inputs.shape[0],
        math.prod(places),
        math.prod(window) * inputs.shape[-1] // groups,
        cotangent.shape[-1] // groups,
    )

    def of_row(pair):
        """x [*places, i], c [*places, o]"""
        x, c = pair
        # Features before places in a window: so merged, those that are split over devices stay so.
        x = _windows(x.astype(wide), eqn.params, window, places)
        x = x.reshape(sizes.t, math.prod(window), groups, -1).transpose(2, 0, 3, 1)
        x = x.reshape(groups, sizes.t, sizes.i)
        c = jnp.moveaxis(c.astype(wide).reshape(sizes.t, groups, sizes.o), 1, 0)
        if squares_cost_less(sizes):
            first, second = (jnp.einsum("gtf,gsf->gts", a, a, precision="highest") for a in (x, c))
            return jnp.sum(first * second)
        return jnp.sum(jnp.square(jnp.einsum("gti,gto->gio", x, c, precision="highest")))

    own = groups * (sizes.t * (sizes.i + sizes.o) + min(sizes.t**2, sizes.i * sizes.o))
    most = max(1, min(sizes.b, (inputs.size + cotangent.size) // (4 * own)))
    block = max(count for count in range(1, most + 1) if sizes.b % count == 0)
    return map_rows(of_row, (inputs, cotangent), block)


def _windows(x: jax.Array, params: dict[str, Any], window, places) -> jax.Array:
    """[*places, prod(window), i] of x [*spatial, i]."""
    dilations = [d - 1 for d in params["lhs_dilation"]]
    padding = [(*pair, d) for pair, d in zip(params["padding"], dilations)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [*padding, (0, 0, 0)])
    # One axis after the other: with a slice for every place in a window, compiling takes long.
    for axis, (size, count) in enumerate(zip(window, places)):
        stride, dilation = params["window_strides"][axis], params["rhs_dilation"][axis]
        starts = [offset * dilation for offset in range(size)]
        ends = [start + (count - 1) * stride + 1 for start in starts]
        moved = [jax.lax.slice_in_dim(x, *pair, stride, axis) for pair in zip(starts, ends)]
        x = jnp.stack(moved, axis=-2)
    return x.reshape(*places, math.prod(window), x.shape[-1])
