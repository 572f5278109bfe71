"""Control flow in which parameters and data meet: the walk goes inside and builds it again."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._jaxprs import scan_counts
from ghostjax.core import loops
from ghostjax.core.place_rules import shape_of
from ghostjax.core.tracking import HANDLERS
from ghostjax.core.tracks import NOWHERE, Where
from ghostjax.core.types import zeros_of
from ghostjax.core.values import Value
from ghostjax.core.walk import Walk


def _remat(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Walks inside, and recomputes with the same policy."""
    key = walk.next_key()

    def run(slots, operands):
        inner = walk.inside(key, slots)
        return inner.run(eqn.params["jaxpr"], operands), inner.results()

    if walk.computes_data:
        run = jax.checkpoint(
            run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
    return _received(walk, run(walk.slots_of(key), operands))


def _received(walk: Walk, found: tuple[Any, tuple[dict, ...]]) -> Any:
    outputs, results = found
    walk.receive(results)
    return outputs


def _coerce(walk: Walk, eqn: Any, value: Value, like: Value) -> Value:
    """``value`` in the class of ``like``, so that a carry or a branch has one class."""
    if like.is_data:
        if not value.is_data:
            # The numbers of ``like`` mean nothing; a constant belongs to nobody.
            value = walk.promote(value, like.where if value.tangents else NOWHERE, eqn)
        where = loops.like(
            value.where, like.where, getattr(value.primal, "shape", ()), walk.num_rows
        )
        return walk.data(value.primal, like.active, where)
    tangents = {
        path: value.tangents[path]
        if path in value.tangents
        else walk.zero_tangent(value.primal, tangent)
        for path, tangent in like.tangents.items()
    }
    return Value(value.primal, tangents)


def _joined(walk: Walk, first: Value, second: Value) -> Value:
    """The class that holds both; its arrays mean nothing."""
    if not (first.is_data or second.is_data):
        return Value(first.primal, {**second.tangents, **first.tangents})
    active = any(value.active or bool(value.tangents) for value in (first, second))
    where = loops.joined(
        first.where, second.where, getattr(first.primal, "shape", ()), walk.num_rows, walk.follows
    )
    return walk.data(first.primal, active, where)


def _slice(walk: Walk, value: Value, shape: tuple[int, ...]) -> Value:
    """One of the values that are scanned over, stacked as ``lax.scan`` takes them."""
    where = loops.sliced(value.where, shape, walk.counts, walk.follows)
    tangents = _loop_first(walk, value.tangents)
    return dataclasses.replace(value, tangents=tangents, where=where, axes=None)


def _stack(walk: Walk, value: Value, length: int) -> Value:
    where = loops.stacked(value.where, length)
    return dataclasses.replace(value, tangents=_loop_first(walk, value.tangents), where=where)


def _loop_first(walk: Walk, tangents: dict[int, Any]) -> dict[int, Any]:
    """Several directions are stacked along the first axis, and so are a loop's rounds."""
    if not walk.stacked:
        return tangents
    return jax.tree.map(lambda tangent: jnp.swapaxes(tangent, 0, 1), tangents)


def _scan(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Walks the body; the class of a carry is a fixed point."""
    params = eqn.params
    num_consts, num_carry = scan_counts(eqn)
    if not walk.follows:
        walk.places_after(eqn, operands)
    # Every round uses them: their gradient is a sum.
    consts = [dataclasses.replace(v, direct=False, axes=None) for v in operands[:num_consts]]
    carry = operands[num_consts : num_consts + num_carry]
    start = num_consts + num_carry
    shapes = [shape_of(var) for var in eqn.invars]
    sliced = [_slice(walk, *pair) for pair in zip(operands[start:], shapes[start:])]
    over = loops.over_positions(operands[start:], sliced)
    sums = loops.accumulators(params["jaxpr"].jaxpr, num_consts, num_carry)
    key = walk.next_key()

    def body(inner, carry, sliced):
        step = loops.at_step(sliced, over)
        if step is not None:
            carry = [
                dataclasses.replace(v, where=loops.placed(v.where, step, len(shape)))
                if v.is_data
                else v
                for v, shape in zip(carry, shapes[num_consts:])
            ]
        outputs = inner.one_round(params["jaxpr"], [*consts, *carry, *sliced])
        after = outputs[:num_carry]
        if step is not None:
            after = [dataclasses.replace(v, where=Where(v.where.rows)) for v in after]
        return after, outputs[num_carry:]

    def one(values):
        return jax.tree.map(lambda array: array[0], values)

    while True:
        after = jax.eval_shape(
            lambda carry, values: body(walk.inside(key), carry, one(values))[0], carry, sliced
        )
        classes = [_joined(walk, *pair) for pair in zip(carry, after)]
        classes = [
            dataclasses.replace(value, where=loops.as_sum(value.where)) if k in sums else value
            for k, value in enumerate(classes)
        ]
        if jax.tree.structure(classes) == jax.tree.structure(carry):
            break
        carry = [
            _coerce(walk, eqn, dataclasses.replace(value, tangents={}), wanted)
            if loops.is_unowned(value, wanted)
            else _coerce(walk, eqn, value, wanted)
            for value, wanted in zip(carry, classes)
        ]

    starts = operands[num_consts:start]
    if params["length"] and any(map(loops.is_unowned, starts, carry)):
        # What starts without rows belongs to those who use it in the first round.
        last = -1 if params["reverse"] else 0
        first = jax.tree.map(lambda array: array[last], sliced)
        trial = walk.inside(f"{key}start")
        trial.meetings = {}  # nothing of this round is kept
        after, _ = body(trial, carry, first)
        after = [_coerce(walk, eqn, *pair) for pair in zip(after, classes)]
        for k, begun in enumerate(starts):
            if not loops.is_unowned(begun, carry[k]):
                continue
            if begun.tangents and _is_passed_on(walk, eqn, [*consts, *carry, *first], k):
                value = walk.meet(eqn, list, [begun], [begun.primal], [after[k].where])[0]
                carry[k] = _coerce(walk, eqn, value, classes[k])
            elif begun.tangents:
                carry[k] = walk.promote(begun, classes[k].where, eqn)
            else:
                carry[k] = dataclasses.replace(carry[k], where=after[k].where)

    def step(carry, each):
        sliced, slots = each
        inner = walk.inside(key, slots)
        after, outputs = body(inner, carry, sliced)
        after = [_coerce(inner, eqn, *pair) for pair in zip(after, classes)]
        return after, (outputs, inner.results())

    carry, results = jax.lax.scan(
        step,
        carry,
        (sliced, walk.slots_of(key)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    outputs = _received(walk, results)
    return carry + [_stack(walk, value, params["length"]) for value in outputs]


def _is_passed_on(walk: Walk, eqn: Any, values: list[Value], number: int) -> bool:
    """Whether gradient flows to a carry from itself in the round before: then it is combined with
    rows there, and only with its own unless that is counted as a conflict."""
    position = scan_counts(eqn)[0] + number
    values = [
        Value(value.primal, {}, value.is_data, k == position, value.where)
        for k, value in enumerate(values)
    ]
    run = walk.inside("trial").run
    return jax.eval_shape(functools.partial(run, eqn.params["jaxpr"]), values)[number].active


def _cond(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Walks every branch; an output is of the class that holds that of all branches."""
    index, *operands = operands
    branches = eqn.params["branches"]
    keys = [walk.next_key() for _ in branches]
    slots = [walk.slots_of(key) for key in keys]

    def branch(number, operands, slots, classes=None):
        inner = walk.inside(keys[number], slots)
        inner.in_branch = True
        outputs = inner.run(branches[number], operands)
        if classes is not None:
            outputs = [_coerce(inner, eqn, *pair) for pair in zip(outputs, classes)]
        return outputs, inner.results()

    numbers = range(len(branches))
    found = [jax.eval_shape(lambda o, k=k: branch(k, o, None)[0], operands) for k in numbers]
    classes = functools.reduce(
        lambda first, second: [_joined(walk, *pair) for pair in zip(first, second)], found
    )
    if index.is_data:  # chooses, so that what it chooses from is not made of parameters alone
        classes = [
            walk.data(
                value.primal,
                value.active or bool(value.tangents),
                value.where if value.rows is not None else index.where,
            )
            for value in classes
        ]
    if index.is_data and not walk.computes_data:
        taken = [_received(walk, branch(k, operands, None, classes)) for k in numbers]
        return taken[0]

    shapes = [
        jax.eval_shape(lambda o, k=k: branch(k, o, slots[k], classes)[1], operands) for k in numbers
    ]

    def filled(number):
        """What the other branches would emit is zero where this one is taken."""

        def run(operands):
            outputs, own = branch(number, operands, slots[number], classes)
            others = [jax.tree.map(zeros_of, shapes[k]) for k in numbers if k != number]
            for found, *rest in zip(own, *others):
                for other in rest:
                    found.update(other)
            return outputs, own

        return run

    return _received(
        walk, jax.lax.switch(index.primal, [filled(number) for number in numbers], operands)
    )


def _while(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    raise NotImplementedError(
        f"{walk.describe(eqn)}: a while loop has no reverse-mode derivative, so parameters "
        "and data cannot meet in it. Use lax.scan, or lax.fori_loop with static bounds."
    )


HANDLERS.update({"remat2": _remat, "scan": _scan, "cond": _cond, "while": _while})
