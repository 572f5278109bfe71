"""The three classes of value in the walk.

constant        no tangents, not data
parameter-only  the primal, and a tangent for every parameter it depends on
data            depends on the batch; knows which axis indexes rows, and whether on parameters too
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from ghostjax.core.place_rules import RowInfo
from ghostjax.core.tracks import NOWHERE, Where


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["primal", "tangents", "where", "support"],
    meta_fields=["is_data", "active", "mask", "direct", "axes"],
    drop_fields=["summands"],
)
@dataclasses.dataclass(frozen=True)
class Value:
    """One value of the walk: arrays with a static class, so that it passes through transforms.

    Attributes:
      primal: the array; None for data where the walk does not compute it.
      tangents: of a parameter-only value, by the number of the parameter, what the direction does
        to it, with a leading axis K where there are several; None where there is none yet.
      is_data: whether it depends on the batch.
      active: whether data depends on parameters too, so that gradient flows back through it.
      where: where data has its rows, and positions if there are labels for them.
      support: of data through which gradient flows, an array that is zero only where the value is,
        and where no gradient passes: a mask that the value was multiplied with.
      mask: whether a value without gradient is made of integers and booleans alone.
      direct: whether a parameter-only value is a parameter, but for its layout and dtype, or what a
        loop takes of it in one round; so that inner products of gradients are the same.
      axes: of a parameter or its transpose, outside of loops, by axis that of the parameter.
      summands: of a sum over rows, a function that gives what rows add to it, or None. It does not
        pass through transforms.
    """

    primal: Any
    tangents: dict[int, Any] = dataclasses.field(default_factory=dict)
    is_data: bool = False
    active: bool = False
    where: Where = NOWHERE
    support: Any = None
    mask: bool = False
    direct: bool = False
    axes: tuple[int, ...] | None = None
    summands: Callable[[], Any] | None = None

    @property
    def rows(self) -> RowInfo:
        return self.where.rows.place


def unsupported(values: Any) -> list[Value]:
    """Values on their way into control flow or out of it, where masks would have to be kept."""
    return [dataclasses.replace(value, support=None, mask=False, summands=None) for value in values]


def paths_of(values: Any) -> list[int]:
    """The parameters that any of the values depends on."""
    return sorted({path for value in values for path in value.tangents})
