"""Linear solves: where rows go, and what their derivatives ask of the matrix."""

from typing import Any

from ghostjax._errors import RowAxisError
from ghostjax._jaxprs import describe_operation
from ghostjax.core.mixing import CHECKS, check_inside, several_message
from ghostjax.core.place_rules import RULES, Rows, Rule, leading, shape_of
from ghostjax.core.places import CONTAINERS, infer


def _solve(core: int) -> Rule:
    """The right side may also have rows along the axis of its vectors, which are solved apart."""

    def rule(eqn, operands, num_rows):
        *matrix, right = operands
        is_left = eqn.params.get("left_side", True)
        vectors = len(shape_of(eqn.invars[-1])) - (1 if is_left else 2)
        if not any(matrix) and right.axis == vectors:
            return right
        return leading(core)(eqn, operands, num_rows)

    return rule


def _custom_linear_solve(eqn, operands, num_rows):
    lengths = eqn.params["const_lengths"]
    start = lengths.matvec + lengths.vecmat
    right_sides = operands[sum(lengths) :]
    inputs = [*operands[start : start + lengths.solve], *right_sides]
    return infer(eqn.params["jaxprs"].solve, inputs, num_rows)


def _check(eqn: Any, infos, actives, rows, num_rows) -> None:
    """The derivative is that of the matrix, whatever the solver does: the matrix must keep rows
    apart, as the steps of a solver that all rows choose need not."""
    matvec, count = eqn.params["jaxprs"].matvec, eqn.params["const_lengths"].matvec
    solved = rows[: len(infos) - sum(eqn.params["const_lengths"])]
    infos = [*infos[:count], *solved]
    actives = [*actives[:count], *[True] * len(solved)]
    check_inside(matvec.jaxpr, infos, actives, num_rows, (eqn,), in_rule=False)
    for found, expected in zip(infer(matvec, infos, num_rows), solved, strict=True):
        if isinstance(expected, Rows) and found != expected:
            raise RowAxisError(
                several_message(describe_operation(eqn), f"its matrix moves {expected}")
            )


RULES.update({"triangular_solve": _solve(2), "tridiagonal_solve": _solve(1)})
CONTAINERS["custom_linear_solve"] = _custom_linear_solve
CHECKS["custom_linear_solve"] = _check
