"""A meeting of concatenated rows, training rows first: its parts, and what each gives.

The training part gives the gradient, the validation part the direction, and both the dots of the
training rows with it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ghostjax.core.gram import gram_costs_less, gram_dots
from ghostjax.core.routes import Product, Repeated, make_meeting
from ghostjax.core.row_parts import Part
from ghostjax.core.values import Value


class Parts:
    """What is static about a meeting of concatenated rows; arrays are handed in.

    Attributes:
      eqn, moving, in_rows, outputs, differentiable, needs_data: those of the whole meeting.
    """

    def __init__(
        self, eqn, function, operands, outputs, rows, num_rows: int, names, num_train: int
    ):
        self.names = names
        self.whole = make_meeting(eqn, function, operands, outputs, rows, num_rows, names)
        self.moving, self.outputs = self.whole.moving, self.whole.outputs
        self.differentiable, self.needs_data = self.whole.differentiable, self.whole.needs_data
        self.eqn, self.in_rows = eqn, self.whole.in_rows
        self.num_train = num_train
        self.train, self.val = (
            Part(self.whole, function, operands, outputs, count)
            for count in (num_train, num_rows - num_train)
        )
        self._kept = sorted({*self.whole.kept, *self.train.kept, *self.val.kept})

    def keep(self, operands: Sequence[Value], outputs: Any) -> Any:
        """The arrays that all else needs. Called once, where the meeting was made."""
        del outputs
        arrays = {position: operands[position].primal for position in self._kept}
        return (
            arrays,
            self.whole.take_consts(),
            [part.take_consts() for part in (self.train, self.val)],
        )

    def _start(self, part: Part) -> int:
        return 0 if part is self.train else self.num_train

    def gradient(self, part: Part, kept, cotangents) -> dict[int, Any]:
        """By position, the cotangents of the moving operands, of the part's rows alone."""
        arrays, consts, of_parts = kept
        own = of_parts[part is self.val]
        return part.gradient(arrays, (consts, own), cotangents, self._start(part))

    def by_parameter(self, gradients: dict[int, Any]) -> dict[int, list[Any]]:
        """The same in the order of what ``Push`` emits."""
        return {path: [gradients[k] for k in own] for path, own in self.moving.items()}

    def dots(self, kept, cotangents, vectors: dict[int, list[Any]]) -> dict[int, Any]:
        """Of the training rows, with directions at the moving operands: by parameter, [B]."""
        part = self.train
        arrays, consts, of_parts = kept
        arrays, cotangents = part.own(arrays, cotangents, 0)
        consts = of_parts[0][0] if part.is_cut else consts
        own = [arrays[position] for position in part.meeting.kept], consts
        route = part.meeting.route(None, late=True)
        sums = part.meeting.sums(own, vectors, cotangents, False, route)
        return {path: found[: self.num_train] for path, found in sums.items()}

    def at_once(self, kept, cotangents) -> tuple[dict[int, Any], dict[int, Any]]:
        """Of parameters that nothing else uses: dots with the validation rows, and the gradient."""
        if isinstance(self.whole, Repeated) and self.whole.few:
            rows = self.whole.flat(self.whole.row_gradients(kept[0], *cotangents))
            train, val = rows[: self.num_train], jnp.sum(rows[self.num_train :], axis=0)
            ((path, (position,)),) = self.moving.items()
            gradient = self.whole.parameter_like(jnp.sum(train, axis=0))
            dots = jnp.einsum("bf,f->b", train, val, precision="highest")
            return {path: dots}, {position: gradient}
        gradients = self.gradient(self.train, kept, cotangents)
        if isinstance(self.whole, Product) and self.train.is_cut:
            train, val = (self._factors(part, kept, cotangents) for part in (self.train, self.val))
            if gram_costs_less(train[0].shape, val[1].shape):
                ((path, _),) = self.moving.items()
                return {path: gram_dots(*train, *val)}, gradients
        direction = self.by_parameter(self.gradient(self.val, kept, cotangents))
        return self.dots(kept, cotangents, direction), gradients

    def _factors(self, part: Part, kept, cotangents):
        arrays, (cotangent,) = part.own(kept[0], cotangents, self._start(part))
        return part.meeting.factors(arrays[1 - part.meeting.parameter], cotangent)
