"""Rows through operations of which only the name is known: attention by cuDNN, callbacks."""

import math
from collections.abc import Sequence
from typing import Any

from ghostjax.core.place_rules import (
    ELEMENTWISE,
    PASSED,
    RULES,
    RowInfo,
    Rows,
    agree,
    lost,
    shape_of,
)
from ghostjax.core.places import BODIES, CONTAINERS
from ghostjax.core.promises import by_rule, opaque


def is_known(name: str) -> bool:
    """Whether rows are followed through every use of a primitive, or shown to be mixed."""
    tables = (BODIES, CONTAINERS, ELEMENTWISE, PASSED, RULES)
    return name not in _ASKED and any(name in table for table in tables)


def _cudnn_attention(eqn: Any, operands: Sequence[RowInfo], num_rows: int):
    """The first axis of every operand and result is the batch, in both of its layouts.

    A bias that all rows share has a batch of one, and its cotangent is a sum over rows.
    """
    rows = agree(eqn, operands)
    if not isinstance(rows, Rows):
        return rows
    if eqn.params.get("score_mod") is not None:
        return opaque(eqn, "has a score_mod, which is not followed")
    if any(math.prod(shape_of(var)) for var in eqn.invars[8:10]) and len(eqn.invars) == _OPERANDS:
        return opaque(eqn, "has pages, of which rows take what tables say")
    if rows.axis != 0:
        return lost(eqn, "has rows on an axis other than the batch")
    size = rows.outer * num_rows * rows.inner
    return [
        rows if shape_of(var)[:1] == (size,) else lost(eqn, "sums over rows") for var in eqn.outvars
    ]


def _callback(eqn: Any, operands: Sequence[RowInfo], num_rows: int):
    why = "calls back into Python, where rows cannot be followed"
    return by_rule(eqn, operands, opaque(eqn, why))


# A registered rule is asked about these where rows cannot be followed.
_ASKED = ("pallas_call", "pure_callback", "io_callback")
_OPERANDS = 10  # of the forward primitive; the last two are tables of pages, which may be empty
_CUDNN = "dot_product_attention"
RULES.update(
    {
        f"{_CUDNN}{kind}_{which}{wrapper}": _cudnn_attention
        for kind in ("", "_fp8")
        for which in ("fwd", "bwd")
        for wrapper in ("", "_wrapper")
    }
)
RULES.update(dict.fromkeys(("pure_callback", "io_callback"), _callback))
