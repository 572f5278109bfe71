"""The walk for directions that are known only after the backward pass.

``Harvest`` keeps every meeting's factors: what it needs of its operands, and the cotangents of its
outputs. ``contract`` brings them together with what ``Push`` finds, when the direction is there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._walk._directed import through_channel
from ghostjax._walk._meeting import Meeting, one_per_row
from ghostjax._walk._walk import Walk


class Harvest(Walk):
    """Emits, by meeting, what it needs of its operands; cotangents go to ``slots``.

    Args:
      marker: a scalar per row, for the jaxpr of one row under ``jax.vmap``.
      slots: by meeting, zeros like the cotangents of its outputs, whose gradient these will be.
        None: a first walk, in shapes, which finds them; they are in ``specs`` afterwards.

    Attributes:
      meetings: by key, what is static about each.
    """

    def __init__(self, names, num_rows, marker: Any = None, slots: dict[str, Any] | None = None):
        super().__init__(names, num_rows)
        self.marker, self.slots = marker, slots
        self.meetings: dict[str, Meeting] = {}

    def attach(self, meeting: Meeting, function, operands):
        key = self.next_key()
        self.meetings[key] = meeting
        outputs = function([value.primal for value in operands])
        self.emitted[key] = jax.lax.stop_gradient(meeting.keep(operands))
        if self.num_rows is None:
            outputs = one_per_row(outputs, self.marker)
        if self.slots is None:
            self.specs[key] = [jnp.zeros_like(outputs[k]) for k in meeting.differentiable]
            return outputs
        return through_channel(meeting, _pass_on, outputs, self.slots[key], ())


def _pass_on(residuals, cotangents):
    del residuals
    return cotangents


def contract(
    meeting: Meeting, kept: Any, cotangents: list[Any], vectors: dict[int, Any], stacked: bool
) -> dict[int, Any]:
    """The dots of one meeting, summed over the loops it is in."""
    (first, *_), (shape, *_) = cotangents, [meeting.outputs[k].shape for k in meeting.differentiable]
    loops = first.ndim - len(shape)
    if not loops:
        return meeting.sums(kept, vectors, cotangents, stacked)
    rounds = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[loops:]), (kept, vectors, cotangents)
    )

    def one(kept, vectors, cotangents):
        return meeting.sums(kept, vectors, cotangents, stacked)

    shapes = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], rounds))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(
        lambda total, each: (jax.tree.map(jnp.add, total, one(*each)), None), zeros, rounds
    )[0]
