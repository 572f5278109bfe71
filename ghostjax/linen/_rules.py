"""Rules: modules whose per-row gradients are known products of inputs and cotangents.

A rule turns a call's input and output cotangent into records, one per parameter of the module. It
exists where that is cheaper than differentiating the module again; every other module is exact all
the same, through ``_calls``. Inputs and outputs may have their row axis anywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ghostjax._errors import RowAxisError
from ghostjax.linen._frames import Frame, is_array
from ghostjax.linen._norms import NORMS, as_tuple, norm_rule, refuse_norm_over_rows
from ghostjax.linen._records import (
    Factors,
    Lookup,
    Record,
    RowGradients,
    accumulation_dtype,
    flatten_positions,
)

# (input, cotangents, input row axis, output row axis) -> records, by the parameters' names.
# A parameter without a record is differentiated.
Rule = Callable[[jax.Array, jax.Array, int, int], Mapping[str, Record]]

# Ids travel as float32 where records come out of the backward pass: integers are exact up to here.
_MAX_TABLE = 2**24


def find_rule(frame: Frame, row_axis: int | None) -> Rule | None:
    """The rule for this call, or None. Subclasses may compute something else: they have none.

    ``row_axis`` is that of the call's first argument.
    """
    module, method, args = frame.module, frame.method, frame.args
    kind = type(module)
    if len(args) != 1 or not is_array(args[0]) or row_axis is None:
        return None
    if any(value is not None for value in frame.kwargs.values()):
        return None  # a normalisation mask, or an equation that the call brings along
    if getattr(module, "promote_dtype", promote_dtype) is not promote_dtype:
        return None
    if not frame.names:
        return None
    ndim = len(args[0].shape)
    if kind in NORMS and method == "__call__":
        return norm_rule(frame, ndim)
    if kind is nn.Dense and method == "__call__" and _plain_product(module):
        return _product_rule(ndim, (ndim - 1,), row_axis)
    if kind is nn.DenseGeneral and method == "__call__" and _plain_product(module):
        if as_tuple(module.batch_dims):
            return None
        axes = tuple(axis % ndim for axis in as_tuple(module.axis))
        return _product_rule(ndim, axes, row_axis)
    if kind is nn.Einsum and method == "__call__" and module.preferred_element_type is None:
        return _einsum_rule(module, ndim, row_axis)
    if kind in (nn.Conv, nn.ConvTranspose) and method == "__call__":
        return _convolution_bias_rule
    if kind is nn.Embed and 1 < module.num_embeddings < _MAX_TABLE:
        return _lookup_rule(module) if method == "__call__" else _attend_rule(method)
    return None


def refuse_mixing_rows(frame: Frame, row_axis: int | None) -> None:
    """Refuses norms and convolutions over the row axis; ``row_axis`` is that of the first input."""
    module = frame.module
    if frame.method != "__call__" or row_axis is None or len(frame.inputs) != 1:
        return
    ndim = len(frame.inputs[0].shape)
    if isinstance(module, NORMS):
        refuse_norm_over_rows(frame, ndim, row_axis)
    if isinstance(module, (nn.Conv, nn.ConvLocal, nn.ConvTranspose)):
        sizes = as_tuple(module.kernel_size)
        window = row_axis - (ndim - 1 - len(sizes))
        if (0 <= window < len(sizes) and sizes[window] > 1) or row_axis == ndim - 1:
            raise RowAxisError(
                f"{frame.name} slides its window over axis {row_axis} of an input of rank {ndim}, "
                "which indexes the rows: it mixes rows, so that no row has a gradient of its own. "
                f"Give it an input [N, {'...' if len(sizes) > 1 else 'T'}, features]."
            )


def _plain_product(module: Any) -> bool:
    return module.dot_general is None and module.dot_general_cls is None


def _bias(cotangents: jax.Array, shape: tuple[int, ...]) -> RowGradients:
    """A bias is added at every position: its per-row gradient is the sum over positions."""
    summed = jnp.sum(cotangents, axis=1, dtype=accumulation_dtype(cotangents))
    return RowGradients(summed.reshape(summed.shape[0], *shape))


def _product_rule(ndim: int, axes: tuple[int, ...], row_axis: int) -> Rule | None:
    """Dense and DenseGeneral: input ``axes`` are contracted, features come last in the output."""
    if row_axis in axes:
        return None
    positions = [axis for axis in range(ndim) if axis not in axes and axis != row_axis]

    def rule(inputs, cotangents, input_axis, output_axis):
        contracted = tuple(inputs.shape[axis] for axis in axes)
        features = cotangents.shape[ndim - len(axes) :]
        inputs = inputs.transpose(input_axis, *positions, *axes).astype(cotangents.dtype)
        cotangents = jnp.moveaxis(cotangents, output_axis, 0)
        factors = Factors(
            flatten_positions(inputs, len(axes)),
            flatten_positions(cotangents, len(features)),
            sizes=(*contracted, *features),
            order=tuple(range(len(contracted) + len(features))),
        )
        return {"kernel": factors, "bias": _bias(factors.cotangents, features)}

    return rule


def _einsum_rule(module: nn.Einsum, ndim: int, row_axis: int) -> Rule | None:
    """Einsums in which every letter of the kernel is either summed or new in the output."""
    if module.einsum_str is None:
        return None
    operands, output = module.einsum_str.replace(" ", "").split("->")
    left, kernel = operands.split(",")
    if "..." in kernel:
        return None
    unused = [chr(code) for code in range(ord("A"), ord("z")) if chr(code) not in operands + output]
    ellipsis = "".join(unused[: ndim - len(left.replace("...", ""))])
    left, output = left.replace("...", ellipsis), output.replace("...", ellipsis)
    if any(len(set(letters)) != len(letters) for letters in (left, kernel, output)):
        return None
    contracted = [letter for letter in left if letter in kernel and letter not in output]
    features = [letter for letter in output if letter in kernel and letter not in left]
    positions = [letter for letter in left if letter not in kernel]
    if set(contracted) | set(features) != set(kernel) or not set(positions) <= set(output):
        return None
    if left[row_axis] not in positions:
        return None
    positions.remove(left[row_axis])
    lead = [left[row_axis], *positions]
    order = tuple((contracted + features).index(letter) for letter in kernel)

    def rule(inputs, cotangents, input_axis, output_axis):
        del input_axis, output_axis
        size = dict(zip(left, inputs.shape)) | dict(zip(output, cotangents.shape))
        inputs = inputs.transpose([left.index(letter) for letter in lead + contracted])
        cotangents = cotangents.transpose([output.index(letter) for letter in lead + features])
        factors = Factors(
            flatten_positions(inputs.astype(cotangents.dtype), len(contracted)),
            flatten_positions(cotangents, len(features)),
            sizes=tuple(size[letter] for letter in contracted + features),
            order=order,
        )
        bias_shape = tuple(size[letter] for letter in features)
        return {"kernel": factors, "bias": _bias(factors.cotangents, bias_shape)}

    return rule


def _convolution_bias_rule(inputs, cotangents, input_axis, output_axis):
    """A convolution's kernel is differentiated; its bias is a bias like any other."""
    del inputs, input_axis
    cotangents = jnp.moveaxis(cotangents, output_axis, 0)
    return {"bias": _bias(flatten_positions(cotangents, 1), cotangents.shape[-1:])}


def _lookup_rule(module: nn.Embed) -> Rule:
    def rule(inputs, cotangents, input_axis, output_axis):
        ids = flatten_positions(jnp.moveaxis(inputs, input_axis, 0), 0)[..., 0]
        cotangents = flatten_positions(jnp.moveaxis(cotangents, output_axis, 0), 1)
        return {"embedding": Lookup(ids, cotangents, module.num_embeddings)}

    return rule


def _attend_rule(method: str) -> Rule | None:
    if method != "attend":
        return None

    def rule(inputs, cotangents, input_axis, output_axis):
        inputs = jnp.moveaxis(inputs, input_axis, 0).astype(cotangents.dtype)
        cotangents = jnp.moveaxis(cotangents, output_axis, 0)
        sizes = (inputs.shape[-1], cotangents.shape[-1])
        return {
            "embedding": Factors(
                flatten_positions(inputs, 1), flatten_positions(cotangents, 1), sizes, order=(1, 0)
            )
        }

    return rule
