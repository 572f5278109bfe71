"""Routes to a parameter's squared norms, and which of them static shapes choose.

features  an elementwise operation with a parameter that is repeated over rows: its gradient by row
gram      a matrix product: inner products over pairs of a row's positions
windows   a convolution: the product of the windows that it moves over, a few rows at a time
pairs     a look-up, or all uses of one matrix: inner products over pairs of a row's positions
rows      the gradient of one row after another
together  the same, put together of all uses, whose cross terms are in it

Norms of parameters that are used once, and as they are, come out of the backward pass. Others wait
until it is over: those of several uses are "pairs" or "together".
"""

import enum
from collections.abc import Sequence
from typing import Any

from ghostjax.core.convolutions import is_unfolded
from ghostjax.core.gram import squares_cost_less
from ghostjax.core.harvest import rounds
from ghostjax.core.routes import Product, Repeated
from ghostjax.core.uses import pairs_cost_less


class NormRoute(enum.StrEnum):
    FEATURES = "features"
    GRAM = "gram"
    WINDOWS = "windows"
    PAIRS = "pairs"
    ROWS = "rows"
    TOGETHER = "together"


def route_at_once(meeting: Any) -> NormRoute:
    """Of a ``RowMeeting`` whose parameters nothing else uses, out of the backward pass."""
    whole = meeting.whole
    if isinstance(whole, Repeated):
        return NormRoute.FEATURES
    if isinstance(whole, Product) and squares_cost_less(whole.sizes):
        return NormRoute.GRAM
    if is_unfolded(whole) and not meeting.row_by_row:
        return NormRoute.WINDOWS
    if meeting.use is not None and pairs_cost_less([meeting.use]):
        return NormRoute.PAIRS
    return NormRoute.ROWS


def route_of_waiting(meetings: Sequence[Any], cotangents: Sequence[Any]) -> NormRoute:
    """Of the ``RowMeeting``s of one parameter that wait, and the cotangents that each has left."""
    uses = [meeting.use for meeting in meetings]
    if None in uses or any(map(rounds, meetings, cotangents)) or not pairs_cost_less(uses):
        return NormRoute.TOGETHER
    return NormRoute.PAIRS
