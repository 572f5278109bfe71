"""The walk of concatenated rows, training rows first and validation rows last."""

import dataclasses
from typing import Any

import chex
import jax

from ghostjax.core.directed import through_channel
from ghostjax.core.parts import Parts
from ghostjax.core.types import typed_as, zeros_of
from ghostjax.core.walk import Walk


@dataclasses.dataclass
class Found:
    """What a first walk, in shapes, finds: by key, the meetings.

    Attributes:
      direct: whether every parameter comes to the meeting once and as it is.
      places: descriptions.
    """

    meetings: dict[str, Any] = dataclasses.field(default_factory=dict)
    direct: dict[str, bool] = dataclasses.field(default_factory=dict)
    places: dict[str, str] = dataclasses.field(default_factory=dict)

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


class Split(Walk):
    """Makes, of training rows alone, gradients; and the dots of these with the validation rows.

    Args:
      loss: whose jaxpr will be walked.
      num_train: B.
      taps: by parameter, zeros [B], whose gradient the dots will be.
      slots: by meeting that is not made ``at_once``, zeros like the cotangents of its outputs. None
        in a walk in shapes, which finds them.
    """

    takes_shared = False
    enters_shard_map = False  # a device may have training rows alone, or validation rows

    def __init__(self, loss, num_train, taps=None, slots=None, at_once=frozenset()):
        super().__init__(loss.names, loss.num_rows, loss.named_meetings)
        self.num_train, self.taps, self.slots = num_train, taps, slots
        self.checks_rows = slots is None
        self.keys_at_once = at_once
        self.found = Found()
        self.mesh = jax.sharding.get_abstract_mesh()

    def make(self, eqn, function, operands, outputs, rows, num_rows):
        kind = (eqn is not None and self.named_meeting(eqn, operands)) or Parts
        return kind(eqn, function, operands, outputs, rows, num_rows, self.names, self.num_train)

    def attach(self, meeting: Parts, function, operands):
        mesh = jax.sharding.get_abstract_mesh()
        if not (mesh.empty or self.mesh.empty) and mesh.axis_types != self.mesh.axis_types:
            raise NotImplementedError(
                f"{self.describe(meeting.eqn)}: parameters ({self.named(operands)}) and data meet "
                f"where axes of the mesh are {_kinds(mesh)} that are {_kinds(self.mesh)} around "
                "it, as in a look-up by .at[].get(out_sharding=), which the engine cannot follow. "
                "Take value_grad_and_dots, with the gradient of the validation loss as the "
                "direction."
            )
        key = self.next_key()
        self.found.meetings[key] = meeting
        moving = [value for value in operands if value.tangents]
        paths = [path for value in moving for path in value.tangents]
        self.found.direct[key] = len(paths) == len(moving) == len(set(paths)) and all(
            value.direct for value in moving
        )
        primals = [
            jax.lax.stop_gradient(value.primal) if value.tangents else value.primal
            for value in operands
        ]
        outputs = function(primals)
        if self.slots is None:
            self.found.places[key] = self.describe(meeting.eqn)
            self.specs[key] = [zeros_of(outputs[k]) for k in meeting.differentiable]
            return outputs
        kept = meeting.keep(operands, outputs)
        if key not in self.keys_at_once:
            self.emitted[key] = jax.lax.stop_gradient(kept)
            return through_channel(meeting, lambda _, c: c, outputs, self.slots[key], ())
        carried = {
            "taps": {path: self.taps[path] for path in meeting.moving},
            "operands": {k: v.primal for k, v in enumerate(operands) if v.tangents},
        }
        kinds = {path: jax.typeof(tap) for path, tap in carried["taps"].items()}

        def backward(kept, cotangents):
            dots, gradients = meeting.at_once(kept, cotangents)
            chex.assert_shape(list(dots.values()), (self.num_train,))
            dots = {path: typed_as(found, kinds[path]) for path, found in dots.items()}
            return {"taps": dots, "operands": gradients}

        return through_channel(meeting, backward, outputs, carried, kept)


def _kinds(mesh) -> str:
    return ", ".join(dict.fromkeys(kind.name.lower() for kind in mesh.axis_types))
