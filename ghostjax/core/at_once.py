"""Walks whose results come out of the backward pass itself, where a parameter is used only once.

What else there is waits: factors are kept, and brought together when the pass is over.
"""

import dataclasses
from typing import Any

import jax

from ghostjax.core.directed import through_channel, to_slots
from ghostjax.core.types import zeros_of
from ghostjax.core.walk import Walk


@dataclasses.dataclass
class Found:
    """What a first walk, in shapes, finds: by key, the meetings.

    Attributes:
      direct: whether every parameter comes to the meeting once and as it is.
      operations: their descriptions, for messages.
    """

    meetings: dict[str, Any] = dataclasses.field(default_factory=dict)
    direct: dict[str, bool] = dataclasses.field(default_factory=dict)
    operations: dict[str, str] = dataclasses.field(default_factory=dict)

    def at_once(self) -> frozenset[str]:
        """Meetings of parameters that nothing else uses: dots come out of their backward pass."""
        uses: dict[int, list[str]] = {}
        for key, meeting in self.meetings.items():
            for path in meeting.moving:
                uses.setdefault(path, []).append(key)
        return frozenset(
            key
            for key, meeting in self.meetings.items()
            if self.direct[key] and all(len(uses[path]) == 1 for path in meeting.moving)
        )

    def update(self, other: "Found") -> None:
        self.meetings.update(other.meetings)
        self.direct.update(other.direct)
        self.operations.update(other.operations)


class AtOnce(Walk):
    """Parameters are constants to the differentiation: their gradients are made apart.

    Args:
      slots: by meeting that has to wait, zeros like the cotangents of its outputs. None in a walk
        in shapes, which finds them.
      at_once: meetings that have not.

    Attributes:
      constant: whether parameters are constants to derivatives of the results, too.
    """

    constant = True

    def __init__(self, loss, slots=None, at_once=frozenset()):
        super().__init__(loss.names, loss.walked_rows, loss.named_meetings)
        self.slots, self.keys_at_once = slots, at_once
        self.checks_rows = slots is None
        self.found = Found()

    def through(self, key: str, meeting: Any, outputs, operands, kept) -> list[Any]:
        """``outputs`` of a meeting made at once, behind a channel."""
        raise NotImplementedError

    def waiting(self, key: str, meeting: Any, outputs, operands, kept) -> list[Any]:
        """``outputs`` of a meeting that waits, behind a channel to its slots."""
        del operands, kept
        return through_channel(meeting, to_slots(self.slots[key]), outputs, self.slots[key], ())

    def attach(self, meeting: Any, function, operands):
        key = self.next_key()
        self.found.meetings[key] = meeting
        meeting.in_branch = self.in_branch
        moving = [value for value in operands if value.tangents]
        paths = [path for value in moving for path in value.tangents]
        self.found.direct[key] = len(paths) == len(moving) == len(set(paths)) and all(
            value.direct for value in moving
        )
        is_constant = [self.constant and bool(value.tangents) for value in operands]
        primals = [
            jax.lax.stop_gradient(value.primal) if fixed else value.primal
            for value, fixed in zip(operands, is_constant)
        ]
        outputs = self.evaluate(function, primals)
        if self.slots is None:
            self.found.operations[key] = self.describe(meeting.eqn)
            self.specs[key] = [zeros_of(outputs[k]) for k in meeting.differentiable]
            return outputs
        if key not in self.keys_at_once and key not in self.slots:
            return outputs
        kept = self.keep(meeting, operands, outputs)
        if key in self.keys_at_once:
            return self.through(key, meeting, outputs, operands, kept)
        self.emitted[key] = jax.lax.stop_gradient(kept) if self.constant else kept
        return self.waiting(key, meeting, outputs, operands, kept)

    def evaluate(self, function, primals) -> list[Any]:
        return function(primals)

    def keep(self, meeting: Any, operands, outputs) -> Any:
        """The arrays that all else needs. Called once, where the meeting was made."""
        del outputs
        return meeting.keep(operands)
