"""Rows through operations that cannot be looked into: what callers promise about them.

A promise about a function is a call in the jaxpr, with a name of its own. Which axes it is about
stands inside: every argument and result goes through a ``split`` into one piece along that axis,
an identity whose axis JAX's batching rules renumber under ``vmap``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ghostjax._jaxprs import describe_operation, is_var
from ghostjax.core.place_rules import Mixed, RowInfo, Rows, agree, lost, shape_of

PREFIX = "ghostjax_rowwise_"
PROMISE = (
    "ghostjax.rowwise around the function that calls it, or ghostjax.register_row_rule, promises "
    "that it keeps rows in place"
)
# rule(axes, shapes, params) -> an axis per output; see ``ghostjax.register_row_rule``.
RowRule = Callable[
    [tuple[int | None, ...], tuple[tuple[int, ...], ...], Mapping[str, Any]],
    Sequence[int | None] | int | None,
]
ROW_RULES: dict[str, RowRule] = {}


def opaque(eqn: Any, why: str) -> Mixed:
    return lost(eqn, f"{why} ({PROMISE})")


def by_rule(eqn: Any, operands: Sequence[RowInfo], otherwise: Any) -> Any:
    """What a registered rule says of an operation, of which nothing else is known.

    Raises:
      ValueError: the rule's answer is not an axis for every output.
    """
    rule = ROW_RULES.get(eqn.primitive.name)
    if rule is None:
        return otherwise
    rows = [info for info in operands if isinstance(info, Rows)]
    if len({(info.outer, info.inner) for info in rows}) > 1:
        return lost(eqn, f"meets rows at different places: {rows[0]} and {rows[1]}")
    axes = tuple(info.axis if isinstance(info, Rows) else None for info in operands)
    answer = rule(axes, tuple(shape_of(var) for var in eqn.invars), eqn.params)
    if answer is NotImplemented:
        return otherwise
    count = len(eqn.outvars)
    answer = [answer] * count if answer is None or isinstance(answer, int) else list(answer)
    ranks = [len(shape_of(var)) for var in eqn.outvars]
    if len(answer) != count or not all(
        axis is None or (isinstance(axis, int) and 0 <= axis < rank)
        for axis, rank in zip(answer, ranks)
    ):
        raise ValueError(
            f"The row rule of {describe_operation(eqn)} must give an axis or None for each of its "
            f"{count} outputs of ranks {ranks}. Found {answer}."
        )
    size = next(shape_of(var)[o.axis] for var, o in zip(eqn.invars, operands) if o in rows)
    return [
        rows[0].at(axis)
        if axis is not None and shape_of(var)[axis] == size
        else lost(eqn, "has a row rule that finds no rows in this output")
        for axis, var in zip(answer, eqn.outvars)
    ]


def is_promise(eqn: Any) -> bool:
    """Whether an equation is a call that ``rowwise`` has made, with all of its marks.

    The calls that autodiff makes of it have residuals for results, which nothing was said about.
    """
    name = eqn.params.get("name") if eqn.primitive.name == "jit" else None
    if not (isinstance(name, str) and name.startswith(PREFIX)):
        return False
    body = _body(eqn)
    made = {var: inner for inner in body.eqns for var in inner.outvars}
    return all(is_var(atom) and atom in made and _is_mark(made[atom]) for atom in body.outvars)


def promised(eqn: Any, operands: Sequence[RowInfo]) -> RowInfo | list[RowInfo]:
    """Row info of the outputs of a call that ``is_promise``."""
    body = _body(eqn)
    inputs = set(body.invars)
    marks = {
        atom: inner
        for inner in body.eqns
        for atom in inner.invars
        if is_var(atom) and atom in inputs and _is_mark(inner)
    }
    places = []
    for number, (var, info) in enumerate(zip(body.invars, operands, strict=True)):
        if not isinstance(info, Rows):
            continue
        axis = _axis(marks[var]) if var in marks else None
        if axis is None:
            return lost(
                eqn,
                f"takes rows in input {number} of shape {shape_of(var)}, which rowwise says has "
                "none. Give it an axis; what the function closes over has to be an argument",
            )
        if info.axis != axis:
            return lost(eqn, f"has rows of input {number} at {info}, where rowwise says {axis}")
        places.append((shape_of(var)[axis], info))
    if not places:
        return agree(eqn, operands)
    if len({(size, info.outer, info.inner) for size, info in places}) > 1:
        return lost(eqn, f"meets rows at different places: {places[0][1]} and {places[1][1]}")
    size, rows = places[0]
    made = {var: inner for inner in body.eqns for var in inner.outvars}
    axes = [(var, _axis(made[var])) for var in body.outvars]
    return [
        rows.at(axis)
        if axis is not None and shape_of(var)[axis] == size
        else lost(eqn, "has a result that rowwise says has no rows")
        for var, axis in axes
    ]


def _body(eqn: Any) -> Any:
    return getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])


def _is_mark(eqn: Any) -> bool:
    name = eqn.primitive.name
    return name == "optimization_barrier" or (name == "split" and len(eqn.params["sizes"]) == 1)


def _axis(mark: Any) -> int | None:
    return mark.params["axis"] if mark.primitive.name == "split" else None
