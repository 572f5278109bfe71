"""Control flow in which parameters and data meet: the walk goes inside and builds it again."""

from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._jaxprs import describe_operation, scan_counts
from ghostjax._walk._inside import slice_rows
from ghostjax._walk._rows import join
from ghostjax._walk._values import Value
from ghostjax._walk._walk import HANDLERS, Walk, check_rows, stack_rows


def _remat(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Walks inside, and recomputes with the same policy."""

    def run(taps, shared, operands):
        return Walk(taps, shared, walk.num_rows).open(eqn.params["jaxpr"], [], operands)

    run = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return run(walk.taps, walk.shared, operands)


def _coerce(walk: Walk, eqn: Any, value: Value, like: Value) -> Value:
    """``value`` in the class of ``like``, so that a carry or a branch has one class."""
    if like.is_data:
        if not value.is_data:
            value = walk.promote(value, like.rows, eqn)
        return Value(value.primal, {}, True, like.active, like.rows)
    tangents = {
        path: value.tangents.get(path, jnp.zeros_like(value.primal)) for path in like.tangents
    }
    return Value(value.primal, tangents)


def _joined(walk: Walk, first: Value, second: Value) -> Value:
    """The class that holds both; its arrays mean nothing."""
    if not (first.is_data or second.is_data):
        return Value(first.primal, {**second.tangents, **first.tangents})
    active = any(value.active or bool(value.tangents) for value in (first, second))
    rows = None if walk.num_rows is None else join(first.rows, second.rows)
    return Value(first.primal, {}, True, active, rows)


def _classes(function, *args) -> list[Value]:
    """The values a function would give, in shapes."""
    return jax.eval_shape(function, *args)


def _same_class(first: Value, second: Value) -> bool:
    return jax.tree.structure(first) == jax.tree.structure(second)


def _scan(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Walks the body; the class of a carry is a fixed point."""
    params = eqn.params
    num_consts, num_carry = scan_counts(eqn)
    if walk.num_rows is not None:
        _check(walk, eqn, operands)
    consts = operands[:num_consts]
    carry = operands[num_consts : num_consts + num_carry]
    sliced = [
        Value(value.primal, value.tangents, value.is_data, value.active, slice_rows(value.rows))
        for value in operands[num_consts + num_carry :]
    ]

    def body(carry, sliced):
        outputs = walk.run(params["jaxpr"], [*consts, *carry, *sliced])
        return outputs[:num_carry], outputs[num_carry:]

    def one(values):
        return jax.tree.map(lambda array: array[0], values)

    while True:
        after, _ = _classes(lambda carry, values: body(carry, one(values)), carry, sliced)
        classes = [_joined(walk, *pair) for pair in zip(carry, after)]
        if all(_same_class(*pair) for pair in zip(classes, carry)):
            break
        carry = [_coerce(walk, eqn, *pair) for pair in zip(carry, classes)]

    def step(carry, sliced):
        after, outputs = body(carry, sliced)
        return [_coerce(walk, eqn, *pair) for pair in zip(after, classes)], outputs

    carry, stacked = jax.lax.scan(
        step,
        carry,
        sliced,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return carry + [
        Value(value.primal, value.tangents, value.is_data, value.active, stack_rows(value.rows))
        for value in stacked
    ]


def _cond(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Walks every branch; an output is of the class that holds that of all branches."""
    index, *operands = operands
    branches = eqn.params["branches"]

    def branch(closed):
        return lambda operands: walk.run(closed, operands)

    classes = None
    for closed in branches:
        found = _classes(branch(closed), operands)
        classes = (
            found if classes is None else [_joined(walk, *pair) for pair in zip(classes, found)]
        )

    def coerced(closed):
        def run(operands):
            return [_coerce(walk, eqn, *pair) for pair in zip(branch(closed)(operands), classes)]

        return run

    return jax.lax.switch(index.primal, [coerced(closed) for closed in branches], operands)


def _while(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    raise NotImplementedError(
        f"{describe_operation(eqn)}: a while loop has no reverse-mode derivative, so parameters "
        "and data cannot meet in it. Use lax.scan, or lax.fori_loop with static bounds."
    )


def _check(walk: Walk, eqn: Any, operands: list[Value]) -> None:
    check_rows(
        eqn,
        [value.rows for value in operands],
        [value.active or bool(value.tangents) for value in operands],
        walk.num_rows,
    )


HANDLERS.update(
    {"remat2": _remat, "checkpoint": _remat, "scan": _scan, "cond": _cond, "while": _while}
)
