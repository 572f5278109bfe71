"""The walk for squared norms: gradients of single rows, or their norms without them.

    |dW_i|^2 = sum_ts (x_it . x_is) (c_it . c_is)       Gram: over pairs of a row's positions
             = sum_io (sum_t x_it c_it)^2               rows: one row's weight gradient at a time

Which of these and others is taken, ``norm_routes`` says.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax.core.at_once import AtOnce, Found
from ghostjax.core.by_devices import splits_rows
from ghostjax.core.channel import set_aside
from ghostjax.core.convolutions import conv_squares
from ghostjax.core.directed import Directed, through_channel, to_slots
from ghostjax.core.gram import gram_squares
from ghostjax.core.meeting import one_per_row, where_taken, wide_dtype
from ghostjax.core.norm_routes import NormRoute, route_at_once
from ghostjax.core.place_rules import Rows
from ghostjax.core.routes import Product, make_meeting
from ghostjax.core.row_blocks import map_parts
from ghostjax.core.row_parts import Part, has_split_rows
from ghostjax.core.types import cotangent_as
from ghostjax.core.uses import Use, pair_squares, use_of
from ghostjax.core.values import Value


class RowMeeting:
    """A meeting that can tell what single examples give its operands; arrays are handed in.

    Attributes:
      whole: the meeting; what is static about it is asked of it.
      by_weights: whether examples are told by weights of rows, as they are not single rows.
      use: what it is of a matrix, if norms are known over pairs of positions.
      row_by_row: whether no loop can go over arrays of rows, as these are on several devices.
    """

    by_weights = False
    use: Use | None = None
    in_branch = False
    keeps_row_gradients = False
    row_by_row = False

    def __init__(self, eqn, function, operands, outputs, rows, num_rows, names):
        self.whole = make_meeting(eqn, function, operands, outputs, rows, num_rows, names)
        self._part = functools.partial(Part, self.whole, function, operands, outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def keep(self, operands: Sequence[Value]) -> Any:
        """The arrays that all else needs. Called once, where the meeting was made."""
        self.part = self._part(self.num_rows if self.by_weights else 1)
        self.all = self._part(self.num_rows) if self.part.is_cut else self.part
        del self._part
        moving = [value for value in operands if value.tangents]
        self.row_by_row = has_split_rows(operands)
        if not (self.by_weights or self.row_by_row) and len(moving) == len(self.moving) == 1:
            self.use = use_of(self.whole, moving[0].axes)
        kept = sorted({*self.whole.kept, *self.part.kept, *self.all.kept})
        arrays = {position: operands[position].primal for position in kept}
        consts = self.whole.take_consts(), self.part.take_consts()
        return arrays, (*consts, self.all.take_consts() if self.part.is_cut else consts[1])

    def weighted(self, weights: Any, kept: Any, cotangents: Sequence[Any]) -> dict[int, Any]:
        """By position, the cotangents of the operands that are made of parameters: those of all
        rows times their weights [B]. Rows of weight 0 may hold what is no number."""
        arrays, (of_whole, _, of_all) = kept
        arrays = self.all.without(arrays, weights)
        found = self.all.weighted_gradient(arrays, (of_whole, of_all), cotangents, weights)
        return self._where_taken(found, cotangents)

    def gradient(self, example: Any, kept: Any, cotangents: Sequence[Any]) -> dict[int, list[Any]]:
        """Of one example, by parameter, in the order of what ``Push`` emits: of the row
        ``example``; or ``by_weights``, of all rows times these [B]."""
        if self.by_weights or not self.part.is_cut:
            weights = example if self.by_weights else self.part.weights(example)
            return self.by_parameter(self.weighted(weights, kept, cotangents))
        arrays, (of_whole, of_part, _) = kept
        found = self.part.gradient(arrays, (of_whole, of_part), cotangents, example)
        return self.by_parameter(self._where_taken(found, cotangents))

    def _where_taken(self, found: dict[int, Any], cotangents) -> dict[int, Any]:
        return where_taken(found, cotangents) if self.in_branch else found

    def by_parameter(self, gradients: dict[int, Any]) -> dict[int, list[Any]]:
        return {path: [gradients[k] for k in own] for path, own in self.moving.items()}

    def sums(self, kept, vectors, cotangents, stacked, route):
        arrays, (consts, *_) = kept
        own = [arrays[position] for position in self.whole.kept], consts
        return self.whole.sums(own, vectors, cotangents, stacked, route)

    def sums_and_gradient(self, kept, vectors, cotangents, stacked):
        arrays, (consts, *_) = kept
        own = [arrays[position] for position in self.whole.kept], consts
        return self.whole.sums_and_gradient(own, vectors, cotangents, stacked)

    def squares(self, kept: Any, cotangents: Sequence[Any]) -> dict[int, Any]:
        """By parameter, each of which comes as it is and once: squared norms [B]."""
        whole, (arrays, _) = self.whole, kept
        match route_at_once(self):
            case NormRoute.FEATURES:
                rows = whole.flat(whole.row_gradients(arrays, *cotangents))
                squares = jnp.sum(jnp.square(rows), axis=1)
            case NormRoute.GRAM:
                factors = whole.factors(arrays[1 - whole.parameter], *cotangents)
                squares = gram_squares(*factors)
            case NormRoute.WINDOWS:
                squares = conv_squares(whole, arrays[0], *cotangents)
            case NormRoute.PAIRS:
                squares = pair_squares([self.use.factors(arrays, *cotangents)])
            case _:
                return self._row_by_row(kept, cotangents)
        return dict.fromkeys(self.moving, squares)

    def _row_by_row(self, kept, cotangents):
        if isinstance(self.whole, Product) and not self.in_branch:
            squares = self.whole.squares(kept[0][1 - self.whole.parameter], *cotangents)
            return dict.fromkeys(self.moving, squares)

        def of_row(row, factors):
            found = self.gradient(row, *factors)
            return {path: sum(map(square, own)) for path, own in found.items()}

        factors = kept, cotangents
        if not self.is_cut(factors):
            return jax.lax.map(lambda row: of_row(row, factors), jnp.arange(self.num_rows))
        leaves, treedef = jax.tree.flatten(factors)
        places = treedef.flatten_up_to(self.places(kept))
        return map_parts(lambda parts: of_row(0, treedef.unflatten(parts)), leaves, places)

    def is_cut(self, factors: Any) -> bool:
        """Whether a row's gradient needs no more of them than what they have of that row, which a
        device can take of the rows that it has."""
        return not self.by_weights and self.part.is_cut and splits_rows(*jax.tree.leaves(factors))

    def places(self, kept: Any, loops: int = 0) -> tuple[Any, list[Any]]:
        """Of what it kept, and of the cotangents: where their rows are, behind the axes of loops;
        None for what all rows need."""

        def behind(info):
            return info.at(loops + info.axis) if isinstance(info, Rows) else None

        arrays, consts = kept
        kept = {position: behind(self.part.operand_rows[position]) for position in arrays}
        none = jax.tree.map(lambda _: None, consts)
        return (kept, none), [behind(info) for info in self.part.places()]


def square(array: Any) -> jax.Array:
    """The sum of squares, in float32 or wider."""
    return jnp.sum(jnp.square(array.astype(wide_dtype(array))))


def squares_to(meeting: RowMeeting, taps: dict[int, Any]):
    """The taps [B] of a meeting, and the backward pass of a channel that gives them its squares."""
    carried = {path: taps[path] for path in meeting.moving}
    kinds = {path: jax.typeof(tap) for path, tap in carried.items()}

    def backward(kept, cotangents):
        found = meeting.squares(kept, cotangents)
        return {path: cotangent_as(found[path], kind) for path, kind in kinds.items()}

    return carried, backward


class OfRows(AtOnce):
    """A walk whose meetings can tell what single examples give.

    Args:
      marker: a scalar per row, for the jaxpr of one row under ``jax.vmap``.
      labels: of positions.

    Attributes:
      by_weights: whether examples are told by weights of rows, as they are not single rows.
    """

    follows = True
    constant = False
    by_weights = False
    no_shard_map = (
        "gradients of single rows are not put together. Use jax.jit with sharded arguments "
        "instead, or call this function inside of a shard_map with check_vma=False."
    )

    def __init__(self, loss, slots=None, at_once=frozenset(), marker=None, labels=None):
        super().__init__(loss, slots, at_once)
        self.marker, self.labels = marker, labels

    def make(self, eqn, function, operands, outputs, rows, num_rows):
        meeting = RowMeeting(eqn, function, operands, outputs, rows, num_rows, self.names)
        meeting.by_weights, meeting.in_branch = self.by_weights, self.in_branch
        return meeting

    def regrouped(self, meeting, ids):
        """Examples are weights of its places, as rows are not in place."""
        meeting.by_weights = True
        return super().regrouped(meeting, ids)

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

    def through(self, key, meeting, outputs, operands, kept):
        carried, backward = squares_to(meeting, self.taps)
        return through_channel(meeting, backward, outputs, carried, kept)


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
    takes_sums = False  # the norm of a row's gradient is made of its parts of all meetings
    no_shard_map = OfRows.no_shard_map
    make = OfRows.make

    def __init__(self, squares, by_weights, at_once, *others):
        super().__init__(*others)
        self.squares, self.by_weights, self.keys_at_once = squares, by_weights, at_once
        self.found = Found()

    def regrouped(self, meeting, ids):
        meeting.by_weights = True
        return super().regrouped(meeting, ids)

    def attach(self, meeting, function, operands):
        key = self.next_key()
        if self.slots is None:
            return function([value.primal for value in operands])
        self.found.meetings[key] = meeting
        vectors, waiting = self.slots[key]
        outputs, kept = self.behind(meeting, function, operands, vectors)
        if key in self.keys_at_once:
            carried, backward = squares_to(meeting, self.squares)
            return through_channel(meeting, backward, outputs, carried, kept)
        if not waiting:
            return outputs
        self.emitted[key] = set_aside(kept, waiting)
        return through_channel(meeting, to_slots(waiting), outputs, waiting, ())
