"""The walk for clipped gradients: squared norms, and what rows give times weights known later."""

import jax

from ghostjax.core.channel import channel
from ghostjax.core.directed import to_slots
from ghostjax.core.squares import Squares, squares_to
from ghostjax.core.types import cotangent_as, in_context


class Clipped(Squares):
    """``Squares``, whose backward pass also makes the parameters' gradients, of weighted rows.

    The weights are the cotangents of ports, zeros [B], one of each meeting, which are emitted. So
    the pass can be pulled back twice: for the norms, and when these have given the weights.
    """

    constant = True  # the gradient comes through the ports alone

    def through(self, key, meeting, outputs, operands, kept):
        carried, backward = squares_to(meeting, self.taps)
        return self._with_port(key, meeting, backward, outputs, operands, carried, kept)

    def waiting(self, key, meeting, outputs, operands, kept):
        slots = self.slots[key]
        return self._with_port(key, meeting, to_slots(slots), outputs, operands, slots, kept)

    def _with_port(self, key, meeting, own, outputs, operands, carried, kept):
        moving = {k: value.primal for k, value in enumerate(operands) if value.tangents}
        kinds = {k: jax.typeof(array) for k, array in moving.items()}

        def backward(kept, cotangents):
            *cotangents, weights = cotangents
            found = in_context(meeting.context(), meeting.weighted, weights, kept, cotangents)
            found = {k: cotangent_as(found[k], kind) for k, kind in kinds.items()}
            return own(kept, cotangents), found

        outputs = list(outputs)
        some = [outputs[k] for k in meeting.differentiable]
        *some, port = channel(backward, [*some, self.marker], (carried, moving), kept)
        self.emitted[f"{key}.port"] = port
        for k, output in zip(meeting.differentiable, some):
            outputs[k] = output
        return outputs
