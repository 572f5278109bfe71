"""The norms of ``explain``: by which route those of each parameter come, and at what cost."""

import dataclasses
import math
from collections.abc import Callable
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
        return _costs(alone, arrays, _clipping)
    except (NotImplementedError, ValueError) as error:  # as of a loss with parts of no row
        clipping_refused = str(error)
    try:
        costs = _costs(alone, arrays, _norms_alone)
    except RowAxisError as error:
        return NormCosts(refused=_COUPLED if loss.shares else str(error))
    except NotImplementedError as error:
        return NormCosts(refused=str(error))
    return dataclasses.replace(costs, clipping_refused=clipping_refused)


def _clipping(loss: Loss, arrays: Arrays, weights: Any) -> tuple[Pass, Any]:
    left, weighted = clipping_pass(loss, arrays, None, at_once=False)
    return left, weighted(weights)


def _norms_alone(loss: Loss, arrays: Arrays, weights: Any) -> tuple[Pass, None]:
    del weights
    return row_pass(loss, arrays, None, at_once=False), None


def _costs(loss: Loss, arrays: Arrays, passes: Callable[..., tuple[Pass, Any]]) -> NormCosts:
    """From ``passes`` in which every meeting waits: so it is known what all of them leave."""
    last: list[Pass] = []

    def traced(arrays, weights):
        left, grads = passes(loss, arrays, weights)
        last.append(left)
        return (left.factors, left.squares, left.conflicts), (left.value, grads)

    weights = jax.ShapeDtypeStruct((loss.num_rows,), jnp.float32)
    program, shapes = jax.make_jaxpr(traced, return_shape=True)(arrays, weights)
    (factors, squares, conflicts), (_, grads) = shapes
    keys = keys_at_once(loss, None, last[-1].found)
    waiting = {key: own for key, own in factors.items() if key not in keys}
    left = dataclasses.replace(
        last[-1], arrays=arrays, squares=squares, factors=waiting, conflicts=conflicts
    )
    extra, norms = _waiting(left)
    for key in factors.keys() & keys:
        own, found = _at_once(left, key, factors[key])
        extra, norms = extra + own, norms | found

    def of_first(count):  # of the program's outputs
        outputs = range(len(program.jaxpr.outvars))
        return flops(program.jaxpr, [number < count for number in outputs])

    count = len(jax.tree.leaves(shapes[0]))
    second = flops_after(program.jaxpr, program.jaxpr.invars[-1:])  # what depends on the weights
    return NormCosts(
        parameters=tuple(norms[path] for path in sorted(norms)),
        flops=of_first(count) + extra,
        extra_flops=extra,
        bytes=_bytes(waiting),
        clipped_flops=None if grads is None else of_first(count + 1) + extra + second,
    )


def _at_once(left: Pass, key: str, factors: Any) -> tuple[int, dict[int, Norm]]:
    """FLOPs of a meeting whose norms come out of the pass, and by parameter what is told."""
    meeting = left.found.meetings[key]
    loops = rounds(meeting, factors[1])
    inside = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(loops) :], leaf.dtype), factors
    )
    times, route = math.prod(loops), route_at_once(meeting)
    own = times * flops(jax.make_jaxpr(meeting.squares)(*inside).jaxpr)
    names = left.loss.names
    return own, {path: Norm(names[path], times, route, own, 0) for path in meeting.moving}


def _waiting(left: Pass) -> tuple[int, dict[int, Norm]]:
    """The same of all meetings that wait."""
    traced = ("arrays", "squares", "factors", "conflicts")

    def later(*arrays):
        own = dataclasses.replace(left, **dict(zip(traced, arrays)))
        return jax.tree.leaves(own.squared_norms())

    jaxpr = jax.make_jaxpr(later)(*(getattr(left, name) for name in traced)).jaxpr
    rows = left.loss.num_rows if left.loss.per_example else 1  # loops stand behind them
    found = {}
    for path, keys in left.uses().items():
        times = [math.prod(rounds(left.found.meetings[k], left.factors[k][1])) for k in keys]
        found[path] = Norm(
            parameter=left.loss.names[path],
            uses=sum(times) // rows,
            route=left.route(keys),
            flops=flops(jaxpr, [number == path for number in range(len(jaxpr.outvars))]),
            bytes=_bytes([left.factors[key] for key in keys]),
        )
    return flops(jaxpr), found


def _bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
