"""A ``custom_vjp`` function of parameters that sums over rows, as a fused loss does.

Its outputs have no rows, but its operands have, and its backward rule makes cotangents with rows
from them before it sums these for a parameter.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import bind, is_inexact
from ghostjax.core.devices import as_many
from ghostjax.core.examples import cells_of, labels_of, localized
from ghostjax.core.linear import NotLinearError
from ghostjax.core.meeting import Cells, Meeting
from ghostjax.core.mixing import no_position_message, several_axes_message
from ghostjax.core.place_rules import Rows
from ghostjax.core.routes import FOLLOWING, SUMMING
from ghostjax.core.tracks import NOWHERE
from ghostjax.core.values import Value
from ghostjax.core.walked_rules import WalkedRule


def fused_meeting(walk: Any, eqn: Any, operands: Sequence[Value], outputs) -> Meeting | None:
    """The meeting of parameters with such a function; None if its operands have no rows."""
    apart = [
        value
        for value, var in zip(operands, eqn.invars)
        if value.is_data and is_inexact(var) and value.where.rows.is_apart
    ]
    apart = [value for value in apart if value.active] or apart
    if not apart:
        return None
    try:
        meeting = _split_or_walked(walk, eqn, operands, outputs, apart)
    except RowAxisError as error:
        if not walk.shares:
            raise
        raise RowAxisError(
            f'{error} With coupled="share" that is so too: a parameter has no share in a backward '
            f"rule that cannot be followed. Use {walk.named(operands)} outside of the function."
        ) from None
    meeting.in_rows.update(dict.fromkeys(meeting.moving, True))
    return meeting


def _split_or_walked(walk, eqn, operands, outputs, apart) -> Meeting:
    try:
        meeting = _meeting(walk, eqn, operands, outputs, apart)
    except RowAxisError as error:
        if any(is_inexact(output) and output.shape for output in outputs):
            raise
        return _walked(walk, eqn, operands, outputs, [NOWHERE] * len(outputs), error)
    walk.check_sums(eqn, operands)
    return meeting


def followed_meeting(walk, eqn, operands, outputs, places, error: RowAxisError) -> Meeting:
    """The meeting with a function whose rule keeps rows, but not in place."""
    try:
        return _walked(walk, eqn, operands, outputs, places, error)
    except ValueError:  # it says less; JAX's own is of a rule that adds up over devices
        raise error from None


def _walked(walk, eqn, operands, outputs, places, error: RowAxisError) -> Meeting:
    if not walk.takes_shared:
        raise error
    try:
        return WalkedRule(walk, eqn, operands, outputs, places)
    except NotLinearError:  # nothing in it is a sum over rows
        pass
    raise error


def _meeting(walk, eqn, operands, outputs, apart) -> Meeting:
    def made(operands, count):
        function, rows = functools.partial(bind, eqn), [None] * len(outputs)
        return walk.make(eqn, function, operands, outputs, rows, count)

    if walk.labels is None and all(isinstance(value.rows, Rows) for value in apart):
        return made(operands, walk.num_rows)
    place = walk.describe(eqn)
    lost = no_position_message(place, walk.named(operands))
    first, *others = [
        labels_of(value.where, jnp.shape(value.primal), walk.num_rows, walk.labels, lost)
        for value in apart
    ]
    cells, count = cells_of(first)
    if isinstance(cells, Cells) or any(cells_of(ids)[1] != count for ids in others):
        raise RowAxisError(several_axes_message(place, walk.named(operands)))
    local = [
        dataclasses.replace(value, where=localized(value.where, jnp.shape(value.primal), count))
        for value in operands
    ]
    meeting = made(local, as_many(count, walk.num_rows))
    walk.count_conflicts([jnp.sum(jnp.ravel(ids) != jnp.ravel(first)) for ids in others])
    return walk.regrouped(meeting, first)


SUMMING["custom_vjp_call"] = fused_meeting
FOLLOWING["custom_vjp_call"] = followed_meeting
