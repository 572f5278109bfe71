"""Which axis of every intermediate of a jaxpr indexes the rows of a batch."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import scan_counts, value_in
from ghostjax.core.place_rules import (
    ELEMENTWISE,
    PASSED,
    RULES,
    Mixed,
    RowInfo,
    Rows,
    elementwise,
    shape_of,
)
from ghostjax.core.promises import by_rule, is_promise, opaque, promised

__all__ = ["BODIES", "Mixed", "RowInfo", "Rows", "infer", "join", "propagate", "split_rows"]

# Primitives that run one jaxpr on their operands, and the parameter that holds it.
BODIES = {
    "call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "remat2": "jaxpr",
}


def join(a: RowInfo, b: RowInfo) -> RowInfo:
    """What holds of a value that may be either: for carries and branches."""
    if a is None or (isinstance(b, Mixed) and not isinstance(a, Mixed)):
        return b
    if b is None or isinstance(a, Mixed) or a == b:
        return a
    return Mixed(f"rows are at {a} or at {b}")


def split_rows(array, rows: Rows, num_rows: int):
    """`array` as [B, everything else]."""
    before, after = array.shape[: rows.axis], array.shape[rows.axis + 1 :]
    outer = math.prod(before) * rows.outer
    inner = rows.inner * math.prod(after)
    array = array.reshape(outer, num_rows, inner)
    return jnp.swapaxes(array, 0, 1).reshape(num_rows, outer * inner)


def rows_first(array, rows: Rows, num_rows: int, positions: Sequence[int], features: Sequence[int]):
    """`array` as [B, T, F]: its axes are positions, the rows among them, and features."""
    shape, axis = array.shape, rows.axis
    split = (rows.outer, num_rows, rows.inner)
    array = array.reshape(*shape[:axis], *split, *shape[axis + 1 :])

    def moved(axes):
        return [k if k < axis else k + 2 for k in axes if k != axis]

    others = sorted([*moved(positions), axis, axis + 2])
    array = array.transpose(axis + 1, *others, *moved(features))
    size = math.prod(shape[k] for k in features)
    return array.reshape(num_rows, -1, size)


def infer(
    jaxpr: core.Jaxpr | core.ClosedJaxpr, inputs: Sequence[RowInfo], num_rows: int
) -> list[RowInfo]:
    """Row info of a jaxpr's outputs; its constants are the same whatever the rows hold."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        outputs = propagate(eqn, [value_in(known, v) for v in eqn.invars], num_rows)
        known.update(zip(eqn.outvars, outputs))
    return [value_in(known, v) for v in jaxpr.outvars]


def propagate(eqn, operands: Sequence[RowInfo], num_rows: int) -> list[RowInfo]:
    """Row info of the outputs of one equation, control flow and calls included."""
    name, operands = eqn.primitive.name, list(operands)
    container = CONTAINERS.get(name) or (_call if name in BODIES else None)
    stateful = any(hasattr(v.aval, "inner_aval") for v in eqn.invars)
    if stateful and container is None:
        outputs = Mixed(f"{name} reads or writes a Ref, which is not followed")
    elif all(o is None for o in operands) and not stateful:
        outputs = None
    elif container is not None:
        outputs = container(eqn, operands, num_rows)
    elif name in PASSED:
        outputs = operands
    elif name in ELEMENTWISE:
        outputs = elementwise(eqn, operands)
    elif mixed := [o for o in operands if isinstance(o, Mixed)]:
        # What is the same for all rows does not move them.
        rows = [None if isinstance(o, Mixed) else o for o in operands]
        looks = name in RULES and any(rows)
        outputs = RULES[name](eqn, rows, num_rows) if looks else mixed[0]
    elif name in RULES:
        outputs = RULES[name](eqn, operands, num_rows)
    else:
        outputs = by_rule(eqn, operands, opaque(eqn, "is not known to keep rows in place"))
    if not isinstance(outputs, list):
        outputs = [outputs] * len(eqn.outvars)
    return [_fitting(eqn, v, o, num_rows) for v, o in zip(eqn.outvars, outputs, strict=True)]


def _fitting(eqn, var, info: RowInfo, num_rows: int) -> RowInfo:
    """A last guard: a place that the shape cannot have is not promised."""
    if isinstance(info, Rows):
        shape = shape_of(var)
        size = info.outer * num_rows * info.inner
        if info.axis >= len(shape) or shape[info.axis] != size:
            return Mixed(f"{eqn.primitive.name} has no row axis in shape {shape}")
    return info


def _call(eqn, operands, num_rows):
    if is_promise(eqn):
        return promised(eqn, operands)
    return infer(eqn.params[BODIES[eqn.primitive.name]], operands, num_rows)


def _custom_partitioning(eqn, operands, num_rows):
    return infer(eqn.params["call"], operands, num_rows)


def _by_devices(eqn, operands, num_rows):
    return infer(eqn.params["jaxpr"], operands, num_rows)


def _fixed_point(body, carry: list[RowInfo]) -> tuple[list[RowInfo], list[RowInfo]]:
    """Infos that the body's first outputs do not change, and what it gives from them."""
    while True:
        outputs = body(carry)
        joined = [join(c, o) for c, o in zip(carry, outputs)]
        if joined == carry:
            return carry, outputs
        carry = joined


def _scan(eqn, operands, num_rows):
    consts, carried = scan_counts(eqn)
    fixed, carry = operands[:consts], operands[consts : consts + carried]
    xs = [_step(o) for o in operands[consts + carried :]]
    carry, outputs = _fixed_point(
        lambda carry: infer(eqn.params["jaxpr"], [*fixed, *carry, *xs], num_rows), carry
    )
    ys = [o.at(o.axis + 1) if isinstance(o, Rows) else o for o in outputs[carried:]]
    return [*carry, *ys]


def _step(info: RowInfo) -> RowInfo:
    if not isinstance(info, Rows):
        return info
    return info.at(info.axis - 1) if info.axis else Mixed("scan along the row axis")


def _while(eqn, operands, num_rows):
    tested, used = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_body = operands[:tested], operands[tested : tested + used]
    carry, _ = _fixed_point(
        lambda carry: infer(eqn.params["body_jaxpr"], [*of_body, *carry], num_rows),
        operands[tested + used :],
    )
    [test] = infer(eqn.params["cond_jaxpr"], [*of_test, *carry], num_rows)
    if test is not None:  # how many rounds is no part of the gradient, but of the value
        mixed = Mixed("while runs as long as rows say")
        carry = [mixed if info is None else info for info in carry]
    return carry


def _cond(eqn, operands, num_rows):
    branches = [infer(branch, operands[1:], num_rows) for branch in eqn.params["branches"]]
    outputs = branches[0]
    for branch in branches[1:]:
        outputs = [join(a, b) for a, b in zip(outputs, branch)]
    if operands[0] is not None:  # which branch is no part of the gradient, but of the value
        mixed = Mixed("cond takes the branch that rows say")
        outputs = [mixed if info is None else info for info in outputs]
    return outputs


def _call_hi_primitive(eqn, operands, num_rows):
    """What it is expanded to; derivatives may be others, so only where no gradient flows."""
    if any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars):
        return by_rule(eqn, operands, opaque(eqn, "is not known to keep rows in place"))
    primitive = eqn.params["_prim"]
    arguments = jax.tree.unflatten(primitive.in_tree, [var.aval for var in eqn.invars])
    return infer(jax.make_jaxpr(primitive.expand)(*arguments), operands, num_rows)


CONTAINERS = {
    "by_devices": _by_devices,
    "call_hi_primitive": _call_hi_primitive,
    "cond": _cond,
    "custom_partitioning": _custom_partitioning,
    "scan": _scan,
    "while": _while,
}
