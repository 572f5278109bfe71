"""Where rows that carry gradient are mixed: an error that names the operation."""

import functools
from collections.abc import Callable
from typing import Any

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import describe_operation, is_inexact, stops, value_in
from ghostjax.core.devices import where_traced
from ghostjax.core.inside import inside, is_container
from ghostjax.core.places import Mixed, RowInfo, Rows, propagate

WAY_OUT = (
    "Keep one row per place along an axis, or write the loss for one row and pass "
    "per_example=True, which then needs no row axis (GradDotProdEngine has none: take "
    "value_grad_and_dots)."
)
ALONE = (
    "If rows do not see each other in the loss, write it for one row and pass per_example=True "
    "(GradDotProdEngine has none: take value_grad_and_dots)"
)
SHARE = (
    'take value_grad_and_dots or value_and_dots_fn with coupled="share", for the derivative of the '
    "loss as only one row's uses of the parameters move."
)

# By primitive: ``check(eqn, infos, actives, rows, num_rows)`` of what only derivatives do.
CHECKS: dict[str, Callable[..., None]] = {}
# By primitive: ``follow(walk, eqn, operands)`` gives where rows are in the outputs of a function
# with a derivative rule, None where they are lost.
FOLLOWED: dict[str, Callable[..., Any]] = {}
# The same, but the outputs as the function alone makes them.
FORWARDS: dict[str, Callable[..., Any]] = {}


def check_rows(eqn, infos, actives, num_rows, around=(), *, in_rule=False) -> list[RowInfo]:
    """Rows of the outputs; an error where rows that carry gradient are mixed into other rows.

    ``in_rule``: the equation is part of a derivative rule, which is not differentiated again.
    """
    if gives_nothing(eqn):
        return []
    has_rows = any(isinstance(info, Rows) for info in infos)
    if has_rows:
        for info, active in zip(infos, actives):
            if active and isinstance(info, Mixed):
                raise RowAxisError(combined_message(describe_operation(eqn, around), info))
    if any(actives):
        for given in inside(eqn, infos, actives, num_rows):
            where_traced(eqn, functools.partial(check_inside, *given, (eqn, *around), in_rule))
    rows = propagate(eqn, infos, num_rows)
    both = [active for info, active in zip(infos, actives) if active and isinstance(info, Rows)]
    lost = [info.reason for info in rows if isinstance(info, Mixed)]
    if len(both) > 1 and lost and not is_container(eqn):
        raise RowAxisError(several_message(describe_operation(eqn, around), lost[0]))
    is_ruled = in_rule and eqn.primitive.name in FOLLOWED
    if any(actives) and has_rows and eqn.primitive.name in CHECKS and not is_ruled:
        CHECKS[eqn.primitive.name](eqn, infos, actives, rows, num_rows)
    return rows


def check_inside(jaxpr, infos, actives, num_rows, around, in_rule):
    """The same of every equation of a jaxpr."""
    pairs = zip(infos, actives, strict=True)
    known = dict(zip(jaxpr.invars, pairs, strict=True))
    for inner in jaxpr.eqns:
        pairs = [value_in(known, atom, (None, False)) for atom in inner.invars]
        active = any(active for _, active in pairs) and not stops(inner)
        sides = [list(side) for side in zip(*pairs)] or [[], []]
        rows = check_rows(inner, *sides, num_rows, around, in_rule=in_rule)
        known.update(
            (var, (info, active and is_inexact(var))) for var, info in zip(inner.outvars, rows)
        )


def combined_message(operation: str, info: Mixed) -> str:
    return (
        f"{operation} combines rows with a value in which rows are mixed ({info.reason}), so that "
        "no row has a gradient of its own. Statistics of the batch can be constants, as the "
        f"running averages of BatchNorm are. {ALONE}; if they do, {SHARE}"
    )


def in_rule_message(operation: str, reason: str, *, what: str = "rows") -> str:
    return (
        f"{operation} combines {what} with a value in which rows are mixed ({reason}), so that no "
        f"row has a gradient of its own. {WAY_OUT}"
    )


def several_message(operation: str, reason: str) -> str:
    return (
        f"{operation} combines rows with other rows ({reason}), so that no row has a gradient of "
        f"its own. {ALONE}; if they do, {SHARE}"
    )


def no_position_message(place: str, paths: str) -> str:
    return (
        f"parameter {paths} meets data in {place}, whose result has no axis of positions, so that "
        "labels [B, T] say nothing of it. Give one label per row, or use the parameter before "
        "positions are summed. Batch arrays have positions along their second axis, where the "
        "first two are those of the labels."
    )


def several_axes_message(place: str, paths: str) -> str:
    return (
        f"parameter {paths} meets data in {place}, where examples are told apart along several "
        "axes. Let them lie along one axis, as in [B * T, features]."
    )


def lost_message(place, path, infos, *, is_factor: bool) -> str:
    reasons = [info.reason for info in infos if isinstance(info, Mixed)]
    before = "Make it a factor of every row's loss, before rows are added up. " if is_factor else ""
    return (
        f"parameter {path} meets data in {place}, whose result has no axis with "
        f"one row per place ({'; '.join(reasons) or 'it depends on no row'}). {before}{WAY_OUT} "
        f"Where rows see each other in the loss, {SHARE}"
    )


def gives_nothing(eqn) -> bool:
    """Whether it only shows what it is given, as ``jax.debug.print`` does."""
    return not eqn.outvars and not any(hasattr(v.aval, "inner_aval") for v in eqn.invars)
