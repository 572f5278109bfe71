"""Meetings whose rows are not in place, or whose examples are not rows: dots by label."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._errors import RowAxisError
from ghostjax.core.meeting import Cells, Meeting
from ghostjax.core.place_rules import Rows
from ghostjax.core.positions import best
from ghostjax.core.tracks import NOBODY, SEVERAL, Moved, Track, Where, axes_apart, ids_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
    """To which example every row, or every position of every row belongs.

    Attributes:
      ids: [B] or [B, T] integers; negative ones belong to nobody.
      count: S.
    """

    ids: Any
    count: int = dataclasses.field(metadata={"static": True})

    @property
    def positions(self) -> int:
        return self.ids.shape[1]


def labels_of(where: Where, shape, num_rows: int, labels: Labels | None, lost: str) -> Any:
    """The example of every place of a value, as numbers are kept; labels if there are any."""
    rows = ids_of(where.rows, shape, num_rows)
    if labels is None:
        return rows
    track = best(where.positions)
    if track is None:
        raise RowAxisError(lost)
    positions = ids_of(track, shape, labels.positions)
    if isinstance(rows, np.ndarray) and isinstance(positions, np.ndarray):
        axes = _axes_in_order(rows, num_rows), _axes_in_order(positions, labels.positions)
        if None not in axes and axes[0] != axes[1]:
            sizes = [1] * len(shape)
            sizes[axes[0]], sizes[axes[1]] = num_rows, labels.positions
            ids = labels.ids if axes[0] < axes[1] else labels.ids.T
            return ids.reshape(sizes)
    found = labels.ids[jnp.maximum(rows, 0), jnp.maximum(positions, 0)]
    several = (rows == SEVERAL) | (positions == SEVERAL)
    nobody = (rows < 0) | (positions < 0)
    return jnp.where(several, SEVERAL, jnp.where(nobody, NOBODY, found))


def _axes_in_order(ids: np.ndarray, count: int) -> int | None:
    """The axis along which ``ids`` count from 0."""
    axes = [axis for axis, size in enumerate(ids.shape) if size > 1]
    in_order = len(axes) == 1 and np.array_equal(ids.ravel(), np.arange(count))
    return axes[0] if in_order else None


def cells_of(ids: Any) -> tuple[Rows | Cells, int]:
    """The places along which ``ids`` tell examples apart, as a meeting sums over all others."""
    axes = axes_apart(Moved(ids.shape))
    if len(axes) == 1:
        return Rows(axes[0]), ids.shape[axes[0]]
    return Cells(tuple(axes)), math.prod(ids.shape)


def localized(where: Where, shape: tuple[int, ...], cells: int) -> Where:
    """An operand's rows, as those of a meeting with so many cells."""
    place = where.rows.place
    if not where.rows.is_apart:
        return where
    axes = axes_apart(place)
    if len(axes) == 1 and shape[axes[0]] == cells:
        return Where(Track(Rows(axes[0])))
    return Where()


def by_label(ids: Any, sums: Any, count: int) -> Any:
    """Sums [..., cells] added up by label, [..., S + 1]; the last is what belongs to nobody."""
    ids = jnp.ravel(ids)
    ids = jnp.where((ids < 0) | (ids >= count), count, ids)
    zeros = jnp.zeros((*sums.shape[:-1], count + 1), sums.dtype)
    return zeros.at[..., ids].add(sums)


def weights_of(ids: Any, weights: Any, count: int) -> jax.Array:
    """The weights [S] of the examples that places belong to; zero where they are nobody's."""
    is_own = (ids >= 0) & (ids < count)
    found = weights[jnp.clip(ids, 0, count - 1)]
    return jnp.where(is_own, found, jnp.zeros_like(found))


class Regrouped:
    """A meeting with rows of its own, whose sums are added up by label.

    Sums have one more entry than there are examples, the last: what belongs to nobody.
    """

    keeps_row_gradients = False

    def __init__(self, meeting: Meeting, ids: Any, count: int):
        self.meeting, self._ids, self.count = meeting, ids, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.meeting, name)

    def keep(self, operands):
        return self.meeting.keep(operands), self.__dict__.pop("_ids")

    def sums(self, kept, vectors, cotangents, stacked, route):
        kept, ids = kept
        return self._by_label(ids, self.meeting.sums(kept, vectors, cotangents, stacked, route))

    def weighted(self, weights, kept, cotangents):
        """By position, the gradient of all examples times their weights."""
        kept, ids = kept
        weights = weights_of(jnp.ravel(ids), weights, self.count)
        return self.meeting.weighted(weights, kept, cotangents)

    def gradient(self, weights, kept, cotangents):
        return self.by_parameter(self.weighted(weights, kept, cotangents))

    def sums_and_gradient(self, kept, vectors, cotangents, stacked):
        kept, ids = kept
        sums, gradient = self.meeting.sums_and_gradient(kept, vectors, cotangents, stacked)
        return self._by_label(ids, sums), gradient

    def _by_label(self, ids, sums):
        return jax.tree.map(lambda sums: by_label(ids, sums, self.count), sums)

    def has_rest(self, path: int) -> bool:
        del path
        return True

    def parted(self, path: int, sums: Any) -> tuple[Any, Any]:
        if not self.in_rows[path]:
            return None, sums
        return sums[..., :-1], sums[..., -1]
