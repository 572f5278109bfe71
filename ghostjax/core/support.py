"""Masks: where a value is zero, and no gradient flows through it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._jaxprs import bind
from ghostjax.core.place_rules import shape_of
from ghostjax.core.values import Value

_LARGEST = 2**20  # of constants that are looked at
# Operations that change layout and dtype, if sizes stay the same.
LAYOUTS = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "squeeze", "transpose"]
)


def support_of(value: Value) -> Any:
    """An array that is zero only where a value is, and where no gradient flows through it."""
    if value.active or value.tangents:
        return value.support
    return value.primal if is_mask(value) else None


def is_mask(value: Value) -> bool:
    """Whether a value is made of integers and booleans alone, or known to be zeros and ones: what
    else is zero is so by chance."""
    if value.mask or not jnp.issubdtype(jnp.result_type(value.primal), jnp.inexact):
        return True
    if value.is_data or isinstance(value.primal, jax.core.Tracer):
        return False
    known = np.asarray(value.primal)
    return known.ndim > 0 and known.size <= _LARGEST and bool(np.isin(known, (0, 1)).all())


def marked(values: list[Value], operands: Sequence[Value]) -> list[Value]:
    """Outputs of an operation through which no gradient flows; numbers by the way do not count."""
    if not all(is_mask(value) or jnp.ndim(value.primal) == 0 for value in operands):
        return values
    return [dataclasses.replace(value, mask=True) for value in values]


def support_after(eqn, operands: Sequence[Value]) -> Any:
    """What is zero only where an operation's result is, and where no gradient passes."""
    name = eqn.primitive.name
    supports = [value.support for value in operands]
    if name in LAYOUTS:
        return None if supports[0] is None else bind(eqn, supports)[0]
    shape = shape_of(eqn.outvars[0])
    if name == "mul":
        found = [mask for mask in map(support_of, operands) if mask is not None]
        return next((mask for mask in found if jnp.shape(mask) == shape), None)
    if name == "dot_general" and not any(eqn.params["dimension_numbers"][0]):
        masks = [support_of(value) for value in operands]
        if any(found is not None for found in masks):
            return bind(
                eqn,
                [
                    jnp.ones(shape_of(var), var.aval.dtype) if found is None else found
                    for found, var in zip(masks, eqn.invars)
                ],
            )[0]
    return None
