"""The norms of ``explain``: by which route those of each parameter come, and at what cost."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._errors import RowAxisError
from ghostjax._flops import flops, flops_after
from ghostjax._loss import Arrays, Loss
from ghostjax._norm_costs import Norm, NormCosts
from ghostjax._row_gradients import Pass, clipping_pass, keys_at_once, row_pass
from ghostjax.core import rounds, route_at_once


_COUPLED = "coupled rows have shares of the loss, and no norms of gradients of their own."


def norms_of(loss: Loss, arrays: Arrays) -> NormCosts:
    """Of a loss whose dots are explained."""
    alone = dataclasses.replace(loss, shares=False)
    try:
        found, value = _squared_norms(alone, arrays)
    except RowAxisError as error:
        return NormCosts(refused=_COUPLED if loss.shares else str(error))
    except NotImplementedError as error:
        return NormCosts(refused=str(error))
    try:
        second = _second_pass(alone, arrays)
    except ValueError as error:  # a part of the loss belongs to no row
        return dataclasses.replace(found, clipping_refused=str(error))
    return dataclasses.replace(found, clipped_flops=found.flops + value + second)


def _squared_norms(loss: Loss, arrays: Arrays) -> tuple[NormCosts, int]:
    """All but clipping; and the FLOPs of the loss that norms do not need."""
    last: list[Pass] = []

    def passed(arrays):
        left = row_pass(loss, arrays, None, at_once=False)
        last.append(left)
        return left.value, left.factors, left.squares, left.conflicts

    program, shapes = jax.make_jaxpr(passed, return_shape=True)(arrays)
    (_, factors, squares, conflicts), left = shapes, last[-1]
    at_once = keys_at_once(loss, None, left.found)
    waiting = {key: own for key, own in factors.items() if key not in at_once}

    def later(arrays, squares, factors, conflicts):
        own = {"arrays": arrays, "squares": squares, "factors": factors, "conflicts": conflicts}
        return jax.tree.leaves(dataclasses.replace(left, **own).squared_norms())

    rest = jax.make_jaxpr(later)(arrays, squares, waiting, conflicts).jaxpr
    found, extra = [], flops(rest)
    for key in factors.keys() & at_once:
        meeting = left.found.meetings[key]
        loops, own = _at_once(meeting, *factors[key])
        extra += own
        route = route_at_once(meeting)
        found += [(path, Norm(loss.names[path], loops, route, own, 0)) for path in meeting.moving]
    kept = dataclasses.replace(left, factors=waiting)
    for path, keys in kept.uses().items():
        alone = flops(rest, [number == path for number in range(len(rest.outvars))])
        rows = loss.num_rows if loss.per_example else 1
        uses = sum(math.prod(rounds(left.found.meetings[k], waiting[k][1])) for k in keys) // rows
        size = _bytes([waiting[key] for key in keys])
        found.append((path, Norm(loss.names[path], uses, kept.route(keys), alone, size)))
    without_value = flops(program.jaxpr, [False, *[True] * (len(program.jaxpr.outvars) - 1)])
    costs = NormCosts(
        parameters=tuple(norm for _, norm in sorted(found, key=lambda pair: pair[0])),
        flops=without_value + extra,
        extra_flops=extra,
        bytes=_bytes(waiting),
    )
    return costs, flops(program.jaxpr) - without_value


def _at_once(meeting: Any, kept: Any, cotangents: Any) -> tuple[int, int]:
    """How often it happens, and the FLOPs of all of that."""
    loops = rounds(meeting, cotangents)
    inside = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(loops) :], leaf.dtype), (kept, cotangents)
    )
    times = math.prod(loops)
    return times, times * flops(jax.make_jaxpr(meeting.squares)(*inside).jaxpr)


def _second_pass(loss: Loss, arrays: Arrays) -> int:
    """FLOPs of the backward pass in which every row has its weight."""

    def again(arrays, weights):
        return clipping_pass(loss, arrays, None)[1](weights)

    weights = jax.ShapeDtypeStruct((loss.num_rows,), jnp.float32)
    jaxpr = jax.make_jaxpr(again)(arrays, weights).jaxpr
    return flops_after(jaxpr, jaxpr.invars[-1:])


def _bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
