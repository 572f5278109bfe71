"""The three classes of value in the walk.

constant        no tangents, not data
parameter-only  the primal, and a tangent for every parameter it depends on
data            depends on the batch; knows which axis indexes rows, and whether on parameters too
"""

import dataclasses
from typing import Any

import jax

from ghostjax._walk._rows import RowInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Value:
    """One value of the walk: arrays with a static class, so that it passes through transforms.

    Attributes:
      primal: the array.
      tangents: by parameter path, what the direction does to a parameter-only value.
      is_data: whether it depends on the batch.
      active: whether data depends on parameters too, so that gradient flows back through it.
      rows: where data has its rows.
    """

    primal: Any
    tangents: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_data: bool = dataclasses.field(default=False, metadata={"static": True})
    active: bool = dataclasses.field(default=False, metadata={"static": True})
    rows: RowInfo = dataclasses.field(default=None, metadata={"static": True})
