"""Integers and booleans that a jaxpr computes from known ones, by NumPy: for static analysis."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ghostjax._jaxprs import CALLS, inner_jaxprs, is_var

Known = np.ndarray | None
# Larger tables of values are not made: what they would tell is then not known.
LIMIT = 2**22

_FUNCTIONS = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "copy": np.array,
    "div": lambda a, b: np.trunc(a / np.where(b == 0, 1, b)).astype(np.int64),
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "select_n": lambda which, *cases: np.choose(which.astype(np.int64), cases),
    "sign": np.sign,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


def literal(value: Any) -> Known:
    array = np.asarray(value)
    return array if array.ndim == 0 and array.dtype.kind in "iub" else None


def evaluate(jaxpr: Any, operands: Sequence[Known]) -> list[Known]:
    """What is known of a jaxpr's outputs; arrays stand for scalars, one for every case."""
    env = dict(zip(jaxpr.invars, operands, strict=True))
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, step(eqn, [read(env, atom) for atom in eqn.invars])))
    return [read(env, atom) for atom in jaxpr.outvars]


def read(env: dict[Any, Known], atom: Any) -> Known:
    return env.get(atom) if is_var(atom) else literal(atom.val)


def step(eqn: Any, operands: Sequence[Known]) -> list[Known]:
    """What is known of the outputs of one equation between scalars."""
    name = eqn.primitive.name
    if name in CALLS:
        ((jaxpr, _),) = inner_jaxprs(eqn)
        return evaluate(jaxpr, operands)
    unknown = [None] * len(eqn.outvars)
    scalars = all(getattr(var.aval, "shape", None) == () for var in (*eqn.invars, *eqn.outvars))
    if any(known is None for known in operands) or not scalars or len(eqn.outvars) != 1:
        return unknown
    if math.prod(np.broadcast_shapes(*(known.shape for known in operands))) > LIMIT:
        return unknown
    kind = np.dtype(eqn.outvars[0].aval.dtype).kind
    if name == "convert_element_type" and kind in "iub":
        return [operands[0].astype(bool if kind == "b" else np.int64)]
    if name not in _FUNCTIONS:
        return unknown
    return [np.asarray(_FUNCTIONS[name](*operands))]
