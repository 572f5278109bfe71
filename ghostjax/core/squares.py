"""The walk for squared norms: gradients of single rows, or their norms without them.

    |dW_i|^2 = sum_ts (x_it . x_is) (c_it . c_is)       Gram: over pairs of a row's positions
             = sum_io (sum_t x_it c_it)^2               rows: one row's weight gradient at a time

Both are for parameters that are used once. Of others, the gradient of one row after another is put
together from all uses, so that their cross terms are in it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._channel import set_aside
from ghostjax.core.at_once import AtOnce, Found
from ghostjax.core.directed import Directed, through_channel
from ghostjax.core.examples import Regrouped
from ghostjax.core.gram import gram_squares, squares_cost_less
from ghostjax.core.meeting import one_per_row, wide_dtype
from ghostjax.core.routes import Product, Repeated, make_meeting
from ghostjax.core.row_parts import Part
from ghostjax.core.types import cotangent_as
from ghostjax.core.values import Value


class RowMeeting:
    """A meeting that can tell what single examples give its operands; arrays are handed in.

    Attributes:
      whole: the meeting; what is static about it is asked of it.
      by_weights: whether examples are told by weights of rows, as they are not single rows.
    """

    by_weights = False
    in_branch = False
    keeps_row_gradients = False

    def __init__(self, eqn, function, operands, outputs, rows, num_rows, names):
        self.whole = make_meeting(eqn, function, operands, outputs, rows, num_rows, names)
        self._part = functools.partial(Part, self.whole, function, operands, outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def keep(self, operands: Sequence[Value]) -> Any:
        """The arrays that all else needs. Called once, where the meeting was made."""
        self.part = self._part(self.num_rows if self.by_weights else self.num_rows and 1)
        del self._part
        kept = sorted({*self.whole.kept, *self.part.kept})
        arrays = {position: operands[position].primal for position in kept}
        return arrays, (self.whole.take_consts(), self.part.take_consts())

    def by_position(self, example: Any, kept: Any, cotangents: Sequence[Any]) -> dict[int, Any]:
        """The cotangents of the operands that are made of parameters: of the row ``example``; or
        ``by_weights`` of all rows times these [B].
        """
        give = self.part.weighted_gradient if self.by_weights else self.part.gradient
        found = give(*kept, cotangents, example)
        if self.in_branch:  # where it is not taken, operands are zeros too
            is_taken = functools.reduce(jnp.logical_or, [jnp.any(c != 0) for c in cotangents])
            found = {k: jnp.where(is_taken, own, jnp.zeros_like(own)) for k, own in found.items()}
        return found

    def gradient(self, example: Any, kept: Any, cotangents: Sequence[Any]) -> dict[int, list[Any]]:
        """The same by parameter, in the order of what ``Push`` emits."""
        return self.by_parameter(self.by_position(example, kept, cotangents))

    def by_parameter(self, gradients: dict[int, Any]) -> dict[int, list[Any]]:
        return {path: [gradients[k] for k in own] for path, own in self.moving.items()}

    def sums(self, kept, vectors, cotangents, stacked, route):
        arrays, (consts, _) = kept
        own = [arrays[position] for position in self.whole.kept], consts
        return self.whole.sums(own, vectors, cotangents, stacked, route)

    def sums_and_gradient(self, kept, vectors, cotangents, stacked):
        arrays, (consts, _) = kept
        own = [arrays[position] for position in self.whole.kept], consts
        return self.whole.sums_and_gradient(own, vectors, cotangents, stacked)

    def squares(self, kept: Any, cotangents: Sequence[Any]) -> dict[int, Any]:
        """By parameter, each of which comes as it is and once: squared norms [B]."""
        whole, (arrays, _) = self.whole, kept
        if isinstance(whole, Repeated):
            rows = whole.flat(whole.row_gradients(arrays, *cotangents))
            return dict.fromkeys(self.moving, jnp.sum(jnp.square(rows), axis=1))
        if isinstance(whole, Product):
            factors = whole.factors(arrays[1 - whole.parameter], *cotangents)
            if squares_cost_less(whole.sizes):
                return dict.fromkeys(self.moving, gram_squares(*factors))

        def of_row(row):
            found = self.gradient(row, kept, cotangents)
            return {path: sum(map(square, own)) for path, own in found.items()}

        return jax.lax.map(of_row, jnp.arange(self.num_rows))


def square(array: Any) -> jax.Array:
    """The sum of squares, in float32 or wider."""
    return jnp.sum(jnp.square(array.astype(wide_dtype(array))))


def squares_behind(meeting: RowMeeting, outputs, kept, taps: dict[int, Any]) -> list[Any]:
    """``outputs`` of a meeting, behind a channel that gives taps [B] the squared norms."""
    carried = {path: taps[path] for path in meeting.moving}
    kinds = {path: jax.typeof(tap) for path, tap in carried.items()}

    def backward(kept, cotangents):
        found = meeting.squares(kept, cotangents)
        return {path: cotangent_as(found[path], kind) for path, kind in kinds.items()}

    return through_channel(meeting, backward, outputs, carried, kept)


def by_weights(meeting: Any) -> Any:
    """Of a meeting whose rows are not in place, examples are weights of its places."""
    if isinstance(meeting, Regrouped):
        meeting.meeting.by_weights = True
    return meeting


class OfRows(AtOnce):
    """A walk whose meetings can tell what single examples give.

    Args:
      marker: a scalar per row, for the jaxpr of one row under ``jax.vmap``.
      labels: of positions.

    Attributes:
      by_weights: whether examples are told by weights of rows, as they are not single rows.
    """

    follows = True
    by_weights = False
    no_shard_map = (
        "gradients of single rows are not put together. Use jax.jit with sharded arguments "
        "instead, or call this function inside of shard_map."
    )

    def __init__(self, loss, slots=None, at_once=frozenset(), marker=None, labels=None):
        super().__init__(loss, slots, at_once)
        self.marker, self.labels = marker, labels

    def make(self, eqn, function, operands, outputs, rows, num_rows):
        meeting = RowMeeting(eqn, function, operands, outputs, rows, num_rows, self.names)
        meeting.by_weights = self.by_weights
        return meeting

    def make_regrouped(self, eqn, function, operands, outputs, places):
        return by_weights(super().make_regrouped(eqn, function, operands, outputs, places))

    def evaluate(self, function, primals):
        outputs = function(primals)
        return outputs if self.num_rows is not None else one_per_row(outputs, self.marker)


class Squares(OfRows):
    """Squared norms of the rows' gradients, in ``taps``; what has to wait, in ``slots``.

    Args:
      taps: by parameter, zeros [B], whose gradient the squared norms will be.
      by_weights: as above.
      slots, at_once, marker, labels: as above.
    """

    def __init__(self, loss, taps, by_weights, **others):
        super().__init__(loss, **others)
        self.taps, self.by_weights = taps, by_weights

    def through(self, meeting, outputs, operands, kept):
        return squares_behind(meeting, outputs, kept, self.taps)


class DirectedSquares(Directed):
    """Both: dots with a direction at hand, and squared norms.

    Args:
      squares: by parameter, zeros [B], whose gradient the squared norms will be.
      by_weights: whether examples are told by weights of rows.
      at_once: meetings whose norms come out of the pass.
      slots: by meeting, the direction there; and for those whose norms have to wait, zeros like the
        cotangents of their outputs, others nothing.
      others: as for ``Directed``.
    """

    other_arrays = (*Directed.other_arrays, "squares")
    no_shard_map = OfRows.no_shard_map
    make = OfRows.make

    def __init__(self, squares, by_weights, at_once, *others):
        super().__init__(*others)
        self.squares, self.by_weights, self.keys_at_once = squares, by_weights, at_once
        self.found = Found()

    def make_regrouped(self, eqn, function, operands, outputs, places):
        return by_weights(super().make_regrouped(eqn, function, operands, outputs, places))

    def attach(self, meeting, function, operands):
        key = self.next_key()
        meeting.in_branch = self.in_branch
        if self.slots is None:
            return function([value.primal for value in operands])
        self.found.meetings[key] = meeting
        vectors, waiting = self.slots[key]
        outputs, kept = self.behind(meeting, function, operands, vectors)
        if key in self.keys_at_once:
            return squares_behind(meeting, outputs, kept, self.squares)
        if not waiting:
            return outputs
        self.emitted[key] = set_aside(kept, waiting)
        return through_channel(meeting, lambda _, c: c, outputs, waiting, ())


class Weighted(OfRows):
    """Gradients of rows times their weights.

    Args:
      weights: [B] of rows, or of labels where these are labels of positions [S].
      marker, labels: as above.
    """

    by_weights = True

    def __init__(self, loss, weights, **others):
        super().__init__(loss, **others)
        self.weights = weights
        self.checks_rows = False

    def attach(self, meeting, function, operands):
        meeting.in_branch = self.in_branch
        primals = [
            jax.lax.stop_gradient(value.primal) if value.tangents else value.primal
            for value in operands
        ]
        outputs = self.evaluate(function, primals)
        carried = {k: value.primal for k, value in enumerate(operands) if value.tangents}
        kinds = {k: jax.typeof(array) for k, array in carried.items()}

        def backward(residuals, cotangents):
            kept, weights = residuals
            found = meeting.by_position(weights, kept, cotangents)
            return {k: cotangent_as(found[k], kind) for k, kind in kinds.items()}

        residuals = meeting.keep(operands), self.weights
        return through_channel(meeting, backward, outputs, carried, residuals)
