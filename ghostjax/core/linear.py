"""Whether what a jaxpr computes is linear in some of its inputs, and which operation is not."""

import enum
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import CALLS, inner_jaxprs, is_inexact, is_var, live_equations, scan_counts


class Kind(enum.Enum):
    """Of a value: zero, linear in the inputs in question, or anything that they do not change."""

    ZERO = "zero"
    LINEAR = "linear"
    FIXED = "fixed"


class NotLinearError(Exception):
    """``eqn`` is the operation that is not linear."""

    def __init__(self, eqn: Any):
        super().__init__(eqn)
        self.eqn = eqn


_SUMS = """
    add add_any all_gather all_gather_invariant all_to_all broadcast_in_dim complex concatenate conj
    convert_element_type copy cumsum device_put fft imag layout_constraint name neg pad ppermute
    psum psum_invariant pvary real reduce_precision reduce_scatter reduce_sum reduce_window_sum
    reshape reshard rev sharding_constraint slice split squeeze stack sub tile transpose unstack
"""
# Operand positions that are linear together; the others must not depend on the inputs in question.
_TOGETHER = {
    **dict.fromkeys(_SUMS.split(), slice(None)),
    "div": slice(0, 1),
    "dynamic_slice": slice(0, 1),
    "dynamic_update_slice": slice(0, 2),
    "gather": slice(0, 1),
    "scatter": slice(0, None, 2),
    "scatter-add": slice(0, None, 2),
    "scatter-sub": slice(0, None, 2),
    "select_n": slice(1, None),
    "triangular_solve": slice(1, 2),
}
_PRODUCTS = frozenset({"conv_general_dilated", "dot_general", "mul"})
_CALLS = CALLS | {"remat2"}
_KEEPS_ZERO = frozenset(_TOGETHER) - {"div", "triangular_solve"}


def kinds_after(eqn: Any, kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds of one equation's outputs.

    Raises:
      NotLinearError: they are neither linear nor fixed.
    """
    name = eqn.primitive.name
    if Kind.LINEAR not in kinds:
        zero = name in _KEEPS_ZERO and set(kinds[_TOGETHER[name]]) == {Kind.ZERO}
        zero = zero or (name in _PRODUCTS and Kind.ZERO in kinds)
        return [Kind.ZERO if zero else Kind.FIXED] * len(eqn.outvars)
    if name == "optimization_barrier":
        return list(kinds)
    if name == "scan":
        return _scan(eqn, list(kinds))
    if name == "cond" and kinds[0] is not Kind.LINEAR:
        branches = [_jaxpr(jaxpr, kinds[1:]) for jaxpr, _ in inner_jaxprs(eqn)]
        outputs = branches[0]
        for branch in branches[1:]:
            outputs = [_joined(eqn, *pair) for pair in zip(outputs, branch)]
        return outputs
    if name in _CALLS:
        ((jaxpr, _),) = inner_jaxprs(eqn)
        return _jaxpr(jaxpr, kinds)
    if name in _PRODUCTS:
        is_linear = kinds.count(Kind.LINEAR) == 1
    elif name in _TOGETHER:
        together = range(len(kinds))[_TOGETHER[name]]
        is_linear = all(
            (kind is not Kind.FIXED) if position in together else (kind is not Kind.LINEAR)
            for position, kind in enumerate(kinds)
        )
    else:
        is_linear = False
    if not is_linear or not all(is_inexact(var) for var in eqn.outvars):
        raise NotLinearError(eqn)
    return [Kind.LINEAR] * len(eqn.outvars)


def kinds_of_outputs(jaxpr: core.Jaxpr, kinds: Sequence[Kind], count: int) -> list[Kind]:
    """The kinds of a jaxpr's first outputs, by those of its inputs."""
    needed, _ = live_equations(jaxpr, [k < count for k in range(len(jaxpr.outvars))])
    return _jaxpr(jaxpr.replace(eqns=needed, outvars=jaxpr.outvars[:count]), kinds)


def kind_of_literal(value: Any) -> Kind:
    return Kind.ZERO if jnp.ndim(value) == 0 and value == 0 else Kind.FIXED


def _jaxpr(jaxpr: core.Jaxpr, kinds: Sequence[Kind]) -> list[Kind]:
    known = dict(zip(jaxpr.invars, kinds, strict=True))

    def read(atom):
        return known.get(atom, Kind.FIXED) if is_var(atom) else kind_of_literal(atom.val)

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, kinds_after(eqn, [read(atom) for atom in eqn.invars])))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(eqn: Any, kinds: list[Kind]) -> list[Kind]:
    ((body, _),) = inner_jaxprs(eqn)
    consts, carries = scan_counts(eqn)
    while True:
        outputs = _jaxpr(body, kinds)
        carry = kinds[consts : consts + carries]
        joined = [_joined(eqn, *pair) for pair in zip(carry, outputs)]
        if joined == carry:
            return outputs
        kinds[consts : consts + carries] = joined


def _joined(eqn: Any, first: Kind, second: Kind) -> Kind:
    if first is second:
        return first
    kinds = {first, second}
    if kinds == {Kind.FIXED, Kind.LINEAR}:
        raise NotLinearError(eqn)
    return Kind.LINEAR if Kind.LINEAR in kinds else Kind.FIXED
