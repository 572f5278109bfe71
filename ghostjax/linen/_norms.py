"""LayerNorm and its kin: y = scale * normalized + bias.

val_total_scale[f] = sum over V rows and positions of cotangents * normalized        [F]
val_total_bias[f]  = sum over V rows and positions of cotangents                     [F]
dots_scale[b] = einsum("bf,f->b", sum over positions of cotangents * normalized, val_total_scale)
dots_bias[b]  = einsum("bf,f->b", sum over positions of cotangents,              val_total_bias)
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghostjax._checks import check_val_batch_size
from ghostjax._errors import RowAxisError
from ghostjax.linen._frames import Frame
from ghostjax.linen._records import RowGradients, accumulation_dtype, contract

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


@functools.partial(jax.jit, static_argnames="val_batch_size")
def layernorm_dot_products(
    normalized: jax.Array, cotangents: jax.Array, val_batch_size: int
) -> dict[str, jax.Array]:
    """Per-row inner products of LayerNorm's scale and bias gradients with the validation rows'.

    With g_r[scale] = sum_t cotangents[r, t, :] * normalized[r, t, :] and
    g_r[bias] = sum_t cotangents[r, t, :], the result is ``dots[b] = <g_b, sum_v g_v>`` for each.

    Args:
      normalized: [N, ..., F], (x - mean) / sqrt(var + epsilon), before scale and bias. The axes
        between the first and the last are positions; there may be none.
      cotangents: gradient of the loss at the layer's output, the same shape.
      val_batch_size: V, static. The last V rows are the validation rows, the first B = N - V the
        training rows.

    Returns:
      ``{"scale": [B], "bias": [B]}``. Inputs are cast to float32 first, sums and products are in
      float32 (all in float64 for float64 inputs). The scale is that of the cotangents: a sum over
      validation rows, not a mean, unless the cotangents carry 1/V.

    Raises:
      ValueError: shapes differ, there is no feature axis, or not 0 < V < N.

    >>> import jax.numpy as jnp
    >>> normalized = jnp.array([[1.0, -1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> cotangents = jnp.array([[1.0, 1.0], [0.5, 2.0], [1.0, -1.0]])
    >>> dots = layernorm_dot_products(normalized, cotangents, val_batch_size=1)
    >>> dots["scale"], dots["bias"]
    (Array([3., 0.], dtype=float32), Array([ 0. , -1.5], dtype=float32))

    Source: Layer Normalization, arXiv:1607.06450; inner products of factors as in Data Shapley in
    One Training Run, arXiv:2406.11011, section 4.2.
    """
    if normalized.shape != cotangents.shape or normalized.ndim < 2:
        raise ValueError(
            "normalized and cotangents must have one shape [N, ..., F] of rank 2 or more. Found "
            f"{normalized.shape} and {cotangents.shape}."
        )
    num_train = normalized.shape[0] - check_val_batch_size(val_batch_size, normalized.shape[0])
    records = _records(normalized, cotangents, (normalized.ndim - 1,), row_axis=0)
    return {name: contract([record], num_train) for name, record in records.items()}


def _records(normalized, cotangents, feature_axes, row_axis) -> dict[str, RowGradients]:
    dtype = accumulation_dtype(normalized, cotangents)
    normalized, cotangents = normalized.astype(dtype), cotangents.astype(dtype)
    return {
        "scale": RowGradients(_sum_to_features(cotangents * normalized, feature_axes, row_axis)),
        "bias": RowGradients(_sum_to_features(cotangents, feature_axes, row_axis)),
    }


def _sum_to_features(values, feature_axes, row_axis):
    """[..., row, ..., features, ...] -> [R, *features], summed over every other axis."""
    kept = (row_axis, *feature_axes)
    others = tuple(axis for axis in range(values.ndim) if axis not in kept)
    summed = jnp.moveaxis(jnp.sum(values, axis=others, keepdims=True), row_axis, 0)
    # Flax reshapes a parameter of several feature axes, it does not transpose it: so does this.
    sizes = tuple(values.shape[axis] for axis in feature_axes)
    return summed.reshape(values.shape[row_axis], *sizes)


def refuse_norm_over_rows(frame: Frame, ndim: int, row_axis: int) -> None:
    """``ndim`` and ``row_axis`` are those of the call's input."""
    module = frame.module
    reduced = _reduction_axes(module, ndim)
    features = _feature_axes(module, ndim)
    if row_axis in (*features, *reduced):
        raise RowAxisError(
            f"{frame.name} normalizes over axes {sorted(reduced)} with features {features} of "
            f"an input of rank {ndim}, whose axis {row_axis} indexes the rows: it "
            "mixes rows, so that no row has a gradient of its own. Normalize over the other axes."
        )


def norm_rule(frame: Frame, ndim: int):
    """The rule of a normalisation layer on one argument of rank ``ndim``."""
    module = frame.module
    feature_axes = _feature_axes(module, ndim)

    def rule(inputs, cotangents, input_axis, output_axis):
        del output_axis
        dtype = accumulation_dtype(inputs)
        names = {field.name for field in dataclasses.fields(module)}
        off = {name: False for name in ("use_scale", "use_bias") if name in names}
        bare = module.clone(parent=None, name=None, dtype=dtype, **off)
        normalized = bare.apply({}, inputs.astype(dtype))
        return _records(normalized, cotangents, feature_axes, input_axis)

    return rule


def _feature_axes(module: Any, ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in as_tuple(getattr(module, "feature_axes", -1)))


def _reduction_axes(module: Any, ndim: int) -> set[int]:
    axes = getattr(module, "reduction_axes", None)
    if axes is None:  # GroupNorm and InstanceNorm: everything but the leading axis
        return set(range(1, ndim))
    return {axis % ndim for axis in as_tuple(axes)}


def as_tuple(axes: Any) -> tuple:
    """Flax lets one axis stand for a tuple of one."""
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
