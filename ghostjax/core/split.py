"""The walk of concatenated rows, training rows first and validation rows last."""

import chex
import jax

from ghostjax.core.at_once import AtOnce
from ghostjax.core.directed import through_channel
from ghostjax.core.parts import Parts
from ghostjax.core.types import typed_as


class Split(AtOnce):
    """Makes, of training rows alone, gradients; and the dots of these with the validation rows.

    Args:
      loss: whose jaxpr will be walked.
      num_train: B.
      taps: by parameter, zeros [B], whose gradient the dots will be.
      slots, at_once: as for ``AtOnce``.
    """

    takes_shared = False
    no_shard_map = (
        "training and validation rows lie on different devices, so that the engine cannot bring "
        "them together. Take value_grad_and_dots, with the gradient of the validation loss as the "
        "direction."
    )

    def __init__(self, loss, num_train, taps=None, slots=None, at_once=frozenset()):
        super().__init__(loss, slots, at_once)
        self.num_train, self.taps = num_train, taps
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
        return super().attach(meeting, function, operands)

    def keep(self, meeting, operands, outputs):
        return meeting.keep(operands, outputs)

    def through(self, meeting: Parts, outputs, operands, kept):
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
