"""The walk with directions at hand: dots come out of the backward pass that makes the gradient."""

from collections.abc import Callable
from typing import Any

import jax

from ghostjax.core.channel import all_but_one, channel
from ghostjax.core.examples import Labels
from ghostjax.core.meeting import Meeting, one_per_row
from ghostjax.core.types import cotangent_as, typed_as, varying_as
from ghostjax.core.walk import Walk


class Directed(Walk):
    """Puts a channel behind every meeting that gives each parameter's tap its inner products.

    Args:
      taps: by parameter, zeros [B] or [K, B], whose gradient the dots will be; of one row's jaxpr
        without the B, with ``labels`` [S] or [K, S].
      shared: the same without the B, for dots that belong to no row.
      stacked: whether there is a K.
      slots: by meeting, the direction there, from ``Push``.
    """

    follows = True
    takes_sums = True
    arrays_of_rows = ("taps",)
    other_arrays = ("shared",)

    def __init__(
        self,
        names,
        num_rows,
        taps: dict[int, Any],
        shared: dict[int, Any],
        stacked,
        slots,
        labels: Labels | None = None,
    ):
        super().__init__(names, num_rows)
        self.taps, self.shared, self.stacked, self.slots = taps, shared, stacked, slots
        self.labels = labels

    def attach(self, meeting: Meeting, function, operands):
        key = self.next_key()
        if self.slots is None:
            return function([value.primal for value in operands])
        return self.behind(meeting, function, operands, self.slots[key])[0]

    def behind(self, meeting: Meeting, function, operands, vectors) -> tuple[list[Any], Any]:
        """The outputs behind a channel, and what was kept of the operands."""
        primals = [value.primal for value in operands]
        some_tap = next(iter(self.taps.values()))
        route = meeting.route(some_tap.shape[0] if self.stacked else None, late=False)
        taken = meeting.takes_gradient(route)
        carried: dict[str, Any] = {
            "taps": {path: self.taps[path] for path, own in meeting.in_rows.items() if own},
            "shared": {
                path: self.shared[path] for path in meeting.moving if meeting.has_rest(path)
            },
        }
        if taken is not None:
            carried["operand"] = primals[taken]
            outputs = all_but_one(function, taken, primals)
        else:
            outputs = function(primals)
        if self.num_rows is None:
            outputs = one_per_row(outputs, some_tap.ravel()[0])
        types = {name: jax.tree.map(jax.typeof, carried[name]) for name in ("taps", "shared")}
        stacked = self.stacked

        def backward(residuals, cotangents):
            found = {}
            if taken is None:
                sums = meeting.sums(*residuals, cotangents, stacked, route)
            else:
                sums, found["operand"] = meeting.sums_and_gradient(*residuals, cotangents, stacked)
            parted = {path: meeting.parted(path, own) for path, own in sums.items()}
            for part, (name, expected) in enumerate(types.items()):
                found[name] = {
                    p: cotangent_as(parted[p][part], kind) for p, kind in expected.items()
                }
            return found

        vectors = {
            path: [varying_as(vector, jax.typeof(primals[k])) for k, vector in zip(moving, own)]
            for path, own in vectors.items()
            for moving in [meeting.moving[path]]
        }
        kept = meeting.keep(operands)
        return through_channel(meeting, backward, outputs, carried, (kept, vectors)), kept


def through_channel(meeting: Meeting, backward, outputs, carried, residuals) -> list[Any]:
    """``outputs`` with a channel behind those that have a cotangent."""
    outputs = list(outputs)
    some = [outputs[position] for position in meeting.differentiable]
    for position, output in zip(
        meeting.differentiable, channel(backward, some, carried, residuals)
    ):
        outputs[position] = output
    return outputs


def to_slots(slots: list[Any]) -> Callable[[Any, list[Any]], list[Any]]:
    """The backward pass of a channel that leaves the cotangents themselves."""
    kinds = [jax.typeof(slot) for slot in slots]

    def backward(_, cotangents):
        return [typed_as(cotangent, kind) for cotangent, kind in zip(cotangents, kinds)]

    return backward
