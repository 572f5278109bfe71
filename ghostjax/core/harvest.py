"""The walk for directions that are known only after the backward pass.

``Harvest`` keeps every meeting's factors: what it needs of its operands, and the cotangents of its
outputs; or in their place the gradients of all rows, where these are less. ``contract`` brings them
together with what ``Push`` finds, when the direction is there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax.core.channel import set_aside
from ghostjax.core.directed import through_channel
from ghostjax.core.meeting import Meeting, one_per_row, where_taken
from ghostjax.core.types import in_context, typed_as, varying_as, zeros_of
from ghostjax.core.walk import Walk


class Harvest(Walk):
    """Emits, by meeting, what it needs of its operands; cotangents go to ``slots``.

    Args:
      marker: a scalar per row, for the jaxpr of one row under ``jax.vmap``.
      slots: by meeting, zeros like what the backward pass leaves, whose gradient this will be.
        None: a first walk, in shapes, which finds them; they are in ``specs`` afterwards.

    Attributes:
      meetings: by key, what is static about each.
    """

    follows = True
    takes_sums = True
    other_arrays = ("marker",)

    def __init__(self, names, num_rows, marker: Any = None, slots=None, labels=None):
        super().__init__(names, num_rows)
        self.marker, self.slots, self.labels = marker, slots, labels
        self.checks_rows = slots is None
        self.meetings: dict[str, Meeting] = {}

    def attach(self, meeting: Meeting, function, operands):
        key = self.next_key()
        self.meetings[key] = meeting
        meeting.in_branch = self.in_branch
        outputs = function([value.primal for value in operands])
        kept = meeting.keep(operands)
        if self.num_rows is None:
            outputs = one_per_row(outputs, self.marker)
        backward = functools.partial(_left, meeting)
        if self.slots is None:
            self.emitted[key] = kept
            left = backward(kept, [outputs[k] for k in meeting.differentiable])
            self.specs[key] = [zeros_of(like) for like in left]
            return outputs
        residuals = ()
        if meeting.keeps_row_gradients:
            kept, residuals = (), kept
        slots = [
            varying_as(slot, jax.typeof(outputs[k]))
            for slot, k in zip(self.slots[key], meeting.differentiable)
        ]
        self.emitted[key] = set_aside(kept, slots)
        kinds = [jax.typeof(slot) for slot in slots]

        def typed(residuals, cotangents):
            return [typed_as(*pair) for pair in zip(backward(residuals, cotangents), kinds)]

        return through_channel(meeting, typed, outputs, slots, residuals)


def _left(meeting: Meeting, residuals: Any, cotangents: list[Any]) -> list[Any]:
    """What the backward pass leaves in the slots of a meeting."""
    if not meeting.keeps_row_gradients:
        return cotangents
    arrays = dict(zip(meeting.kept, residuals[0]))
    return [meeting.row_gradients(arrays, *cotangents)]


def contract(
    meeting: Meeting,
    kept: Any,
    cotangents: list[Any],
    vectors: dict[int, Any],
    directions: int | None,
) -> dict[int, Any]:
    """The dots of one meeting, summed over the loops it is in.

    ``directions`` is K where ``vectors`` are stacked.
    """
    if not cotangents:  # a comparison, say: nothing flows back through its outputs
        return {}
    route, stacked = meeting.route(directions, late=True), directions is not None
    one = functools.partial(sums_of_left, meeting, route, stacked)
    every = functools.partial(summed, one, meeting)
    return in_context(meeting.context(), every, kept, cotangents, vectors)


def sums_of_left(meeting: Meeting, route, stacked: bool, kept, cotangents, vectors):
    """The dots of a meeting by what its backward pass left."""
    if meeting.keeps_row_gradients:
        return meeting.sums_of_rows(*cotangents, vectors, stacked)
    sums = meeting.sums(kept, vectors, cotangents, stacked, route)
    return where_taken(sums, cotangents) if meeting.in_branch else sums


def summed(function: Any, meeting: Any, kept: Any, cotangents: list[Any], *others: Any) -> Any:
    """``function(kept, cotangents, ...)`` of a meeting, summed over the loops it is in."""
    loops = rounds(meeting, cotangents)
    if not loops:
        return function(kept, cotangents, *others)
    every = _in_one_loop((kept, cotangents, *others), len(loops))
    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], every))
    zeros = jax.tree.map(zeros_of, shapes)

    def step(total, each):
        return jax.tree.map(jnp.add, total, function(*each)), None

    return jax.lax.scan(step, zeros, every)[0]


def mapped(function: Any, meeting: Any, kept: Any, cotangents: list[Any]) -> Any:
    """The same, stacked as the loops stack."""
    loops = rounds(meeting, cotangents)
    if not loops:
        return function(kept, cotangents)
    every = _in_one_loop((kept, cotangents), len(loops))
    found = jax.lax.map(lambda each: function(*each), every)
    return jax.tree.map(lambda leaf: leaf.reshape(*loops, *leaf.shape[1:]), found)


def rounds(meeting: Any, cotangents: list[Any]) -> tuple[int, ...]:
    """The lengths of the loops that stacked the cotangents."""
    first = meeting.differentiable[0]
    shape = cotangents[0].shape
    return shape[: len(shape) - len(meeting.outputs[first].shape)]


def _in_one_loop(trees: Any, loops: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[loops:]), trees)
