"""Sums over rows, by their summands: a parameter that multiplies a mean has exact dots per row.

As long as a sum is used linearly, it is taken apart again where it meets a parameter. With w the
parameter, G the direction there, s_i what row i adds to the sum, and c the cotangent of op(s, w),

    dots[i] = < c , J_w op(s_i, w) . G >

Summands are made at such a meeting only: programs without one do not pay for them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import CALLS, bind
from ghostjax.core.examples import by_label, labels_of
from ghostjax.core.meeting import Meeting, paired
from ghostjax.core.place_rules import Mixed, Rows
from ghostjax.core.promises import is_promise
from ghostjax.core.tracking import HANDLERS
from ghostjax.core.tracks import Moved, axes_apart, is_single
from ghostjax.core.types import zeros_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summands:
    """What a sum is made of.

    Attributes:
      own: [S, ...], what every example adds.
      rest: [...], what nobody adds: constants and parameters; None if there is nothing.
    """

    own: Any
    rest: Any


# Linear in all of their operands at once; of select_n, but the first.
_JOINT = frozenset(
    """
    add add_any broadcast_in_dim concatenate convert_element_type copy neg pvary reduce_sum reshape
    select_n slice squeeze stack sub transpose
    """.split()  # noqa: SIM905
)
# Linear in one operand when the others are given: in which ones.
_SINGLE = {"mul": (0, 1), "div": (0,), "dot_general": (0, 1)}


def with_summands(walk: Any, eqn: Any, operands: Sequence[Any], values: list[Any]) -> list[Any]:
    """The outputs of an equation, those that are sums with a way to their summands."""
    if not walk.takes_sums or eqn is None:
        return values
    return [
        dataclasses.replace(
            value, summands=functools.cache(functools.partial(_after, walk, eqn, operands, k))
        )
        if value.active and isinstance(value.rows, Mixed)
        else value
        for k, value in enumerate(values)
    ]


def _after(walk: Any, eqn: Any, operands: Sequence[Any], output: int) -> Summands | None:
    """The summands of an output; None if it is no sum, or used otherwise than linearly."""
    name = eqn.primitive.name
    if name in CALLS and not is_promise(eqn) and not any(v.tangents for v in operands):
        inner = walk.inside("summands")
        value = HANDLERS[name](inner, eqn, operands)[output]
        return summands_of(walk, value)
    if name == "reduce_sum" and operands[0].where.rows.is_apart:
        return _apart(walk, operands[0], eqn.params["axes"])
    if name == "dot_general" and any(value.where.rows.is_apart for value in operands):
        return _of_product(eqn, operands)
    found = [summands_of(walk, value) for value in operands]
    has = [k for k, own in enumerate(found) if own is not None]
    others = [value for value, own in zip(operands, found) if own is None]
    if not has or any(value.active for value in others):
        return None
    primals = [value.primal for value in operands]
    if name in _SINGLE:
        (k,) = has if len(has) == 1 else (None,)
        return _applied(eqn, primals, {k: found[k]}, {}) if k in _SINGLE[name] else None
    if name not in _JOINT:
        return None
    added = [k for k, own in enumerate(found) if own is None and (name, k) != ("select_n", 0)]
    if name == "select_n" and 0 in has:
        return None
    return _applied(
        eqn, primals, {k: found[k] for k in has}, {k: zeros_of(primals[k]) for k in added}
    )


def _applied(eqn, primals, found: dict[int, Summands], none: dict[int, Any]) -> Summands:
    """An operation on summands. ``none``: of operands that are added, zeros in their place."""

    def of(parts):
        filled = [parts.get(k, none.get(k, primal)) for k, primal in enumerate(primals)]
        return bind(eqn, filled)[0]

    rest = {
        k: jnp.zeros(own.own.shape[1:], own.own.dtype) if own.rest is None else own.rest
        for k, own in found.items()
    }
    own = jax.vmap(of)({k: summands.own for k, summands in found.items()})
    if not none and all(summands.rest is None for summands in found.values()):
        return Summands(own, None)
    return Summands(own, bind(eqn, [rest.get(k, primal) for k, primal in enumerate(primals)])[0])


def summands_of(walk: Any, value: Any) -> Summands | None:
    """Of a sum, or of what belongs to a single example."""
    if value.summands is not None:
        return value.summands()
    if value.is_data and is_single(value.where.rows):
        return _apart(walk, value, ())
    return None


def _apart(walk: Any, value: Any, axes: Sequence[int]) -> Summands | None:
    """Of the sum of a value over ``axes``, among which are all that tell examples apart."""
    shape = jnp.shape(value.primal)
    try:
        ids = labels_of(value.where, shape, walk.num_rows, walk.labels, "")
    except RowAxisError:
        return None
    along = axes_apart(Moved(ids.shape))
    if not set(along) <= set(axes):
        return None
    others = [axis for axis in axes if axis not in along]
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    summed = jnp.sum(value.primal, axis=others, keepdims=True).transpose(*along, *others, *kept)
    summed = summed.reshape(-1, *(shape[axis] for axis in kept))
    place = value.rows
    if walk.labels is None and isinstance(place, Rows) and place.outer * place.inner == 1:
        return Summands(summed, None)
    count = walk.labels.count if walk.labels else walk.num_rows
    moved = by_label(ids, jnp.moveaxis(summed, 0, -1), count)
    moved = jnp.moveaxis(moved, -1, 0)
    return Summands(moved[:-1], moved[-1])


def _of_product(eqn, operands) -> Summands | None:
    """Of a product that sums over rows which both sides have in the same order, or one alone."""
    (contracted, batch), kept = eqn.params["dimension_numbers"], []
    for side, value in enumerate(operands):
        place = value.rows
        if isinstance(place, Rows) and place.outer * place.inner == 1:
            if place.axis in contracted[side]:
                kept.append(tuple(contracted[side]).index(place.axis))
        elif value.active or value.where.rows.is_apart:
            return None
    if not kept or len(set(kept)) > 1:
        return None
    (at,) = set(kept)
    pairs = [(tuple(axes)[:at] + tuple(axes)[at + 1 :]) for axes in contracted]
    batches = [(contracted[side][at], *batch[side]) for side in (0, 1)]
    params = {"dimension_numbers": (tuple(pairs), tuple(batches))}
    params |= {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    primals = [value.primal for value in operands]
    return Summands(jax.lax.dot_general(*primals, **params), None)


class SumMeeting(Meeting):
    """A meeting of parameters with a sum over rows, that is linear in the sum.

    Attributes:
      position: of the operand that is a sum.
    """

    def _prepare(self, function, operands):
        super()._prepare(function, operands)
        self.position, self._summands, self._has_rest = None, None, False

    def take(self, position: int, summands: Summands) -> None:
        self.position, self._summands = position, summands
        self._has_rest = summands.rest is not None

    def keep(self, operands):
        arrays, consts = super().keep(operands)
        arrays[self.kept.index(self.position)] = self.__dict__.pop("_summands")
        return arrays, consts

    def sums(self, kept, vectors, cotangents, stacked, route):
        """By parameter, the dots of examples and those of nobody, or None."""
        del route
        arrays, consts = kept
        operands = dict(zip(self.kept, arrays))
        consts = dict(zip(sorted(self._programs), consts))
        summands = operands[self.position]

        def one(path, vectors):
            moving = self.moving[path]

            def of(part):
                filled = {**operands, self.position: part}
                (tangent,) = self._programs[moving](filled, consts[moving], vectors)
                return jnp.sum(paired(cotangents[0], tangent))

            rest = None if summands.rest is None else of(summands.rest)
            return jax.vmap(of)(summands.own), rest

        return {
            path: jax.vmap(functools.partial(one, path))(found) if stacked else one(path, found)
            for path, found in vectors.items()
        }

    def has_rest(self, path: int) -> bool:
        del path
        return self._has_rest

    def parted(self, path: int, sums: Any) -> tuple[Any, Any]:
        del path
        return sums


def sum_meeting(walk: Any, eqn: Any, function: Callable, operands, outputs) -> Meeting | None:
    """The meeting of parameters with a sum; None if no dots follow from its summands."""
    name = None if eqn is None else eqn.primitive.name
    if not walk.takes_sums or (name not in _JOINT and name not in _SINGLE):
        return None
    if name in _JOINT and not any(map(jnp.shape, outputs)):
        return None  # a sum of scalars, of which the part without rows is known
    found = {
        k: summands
        for k, value in enumerate(operands)
        if value.is_data and (summands := summands_of(walk, value)) is not None
    }
    if not found or any(value.active for k, value in enumerate(operands) if k not in found):
        return None
    rows = [None] * len(outputs)
    if name in _JOINT:  # what is added to a sum belongs to nobody
        meeting = Meeting(eqn, function, operands, outputs, rows, walk.num_rows, walk.names)
        meeting.in_rows = dict.fromkeys(meeting.moving, False)
        return None if meeting.needs_data else meeting
    if len(found) > 1 or not set(found) <= set(_SINGLE[name]):
        return None
    ((position, summands),) = found.items()
    meeting = SumMeeting(eqn, function, operands, outputs, rows, walk.num_rows, walk.names)
    meeting.in_rows = dict.fromkeys(meeting.moving, True)
    meeting.take(position, summands)
    return meeting
