"""Which example every place of an array belongs to, where rows do not stay in place.

As long as they do, that is a static fact about an axis (``Rows``). Where an operation moves them,
their numbers are moved by the same operation: they are known while tracing where the move is
(``Known``), and otherwise an integer array that is computed along (``Moved``). Arrays of numbers
have the rank of the value, and size 1 along axes that do not tell examples apart.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax.core.place_rules import Mixed, Rows

NOBODY = -1  # such as padding, through which no gradient flows
SEVERAL = -2  # what gradient does not flow through may be made of several examples
STRANGER = -3  # where parameters have met what belongs to nobody


class Known:
    """The number of the example at every place, known while tracing."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    @functools.cached_property
    def _bytes(self) -> bytes:
        return np.ascontiguousarray(self.ids, np.int32).tobytes()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ids.shape

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, Known) and self.shape == other.shape and self._bytes == other._bytes
        )

    def __hash__(self) -> int:
        return hash((self.shape, self._bytes))

    def __repr__(self) -> str:
        return f"Known({self.ids.tolist() if self.ids.size < 20 else self.shape})"


@dataclasses.dataclass(frozen=True)
class Moved:
    """Numbers are in an array of this shape."""

    shape: tuple[int, ...]


Place = Rows | Known | Moved | Mixed | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Track:
    """A place and, where that is ``Moved``, its numbers."""

    place: Place = dataclasses.field(default=None, metadata={"static": True})
    ids: Any = None

    @property
    def is_apart(self) -> bool:
        """Whether examples are told apart."""
        return isinstance(self.place, (Rows, Known, Moved))


NO_TRACK = Track()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Where a value has its rows, and its positions if labels tell these apart.

    Attributes:
      rows: strictly: rows that are combined with others are rows no more.
      positions: leniently: all the axes (or numbers) that tell positions apart, as those of queries
        and those of keys do.
    """

    rows: Track = NO_TRACK
    positions: tuple[Track, ...] = ()


NOWHERE = Where()


def ids_of(track: Track, shape: tuple[int, ...], count: int) -> Any:
    """The numbers of a track as an array: of numpy where they are known."""
    place = track.place
    if isinstance(place, Rows):
        along = np.arange(shape[place.axis], dtype=np.int32) // place.inner % count
        return along.reshape([-1 if axis == place.axis else 1 for axis in range(len(shape))])
    return place.ids if isinstance(place, Known) else track.ids


def track_of(ids: Any, shape: tuple[int, ...], count: int) -> Track:
    """The track of an array of numbers, in the shortest form."""
    if not isinstance(ids, np.ndarray):
        return Track(Moved(tuple(ids.shape)), ids)
    for axis in range(ids.ndim):
        first = ids.take([0], axis=axis)
        if ids.shape[axis] > 1 and (ids == first).all():
            ids = first
    axes = axes_apart(Known(ids))
    if len(axes) == 1 and count > 1:
        (axis,) = axes
        along = ids.ravel()
        inner = int(np.argmax(along != along[0]))
        size = len(along)
        if size % (inner * count) == 0 and np.array_equal(along, np.arange(size) // inner % count):
            return Track(Rows(axis, size // (inner * count), inner))
    return Track(Known(ids.astype(np.int32)))


def repeated(ids: Any, shape: Sequence[int], axes: Sequence[int]) -> Any:
    """``ids`` repeated along ``axes``."""
    xp = np if isinstance(ids, np.ndarray) else jnp
    return xp.broadcast_to(
        ids, [shape[k] if k in axes else size for k, size in enumerate(ids.shape)]
    )


def merged(first: Any, second: Any) -> tuple[Any, Any]:
    """The numbers of what is made of both, and where they differ."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return _merged(np, first, second)
    return _merged_jit(first, second)


def _merged(xp: Any, first: Any, second: Any) -> tuple[Any, Any]:
    is_first, is_second = first >= 0, second >= 0
    least = xp.minimum(first, second)
    found = xp.where(is_first, first, xp.where(is_second, second, least))
    is_first, is_second = is_first | (first == STRANGER), is_second | (second == STRANGER)
    return found, is_first & is_second & (first != second)


# One equation, as a walk merges numbers after every operation: tracing it all takes half the time.
_merged_jit = jax.jit(functools.partial(_merged, jnp))


def settled(track: Track) -> Track:
    """Where parameters have met what a value belongs to: gradient flows through all of it now."""
    if isinstance(track.place, Known) and (track.place.ids == NOBODY).any():
        return Track(Known(np.where(track.place.ids == NOBODY, STRANGER, track.place.ids)))
    if isinstance(track.place, Moved):
        return Track(track.place, jnp.where(track.ids == NOBODY, STRANGER, track.ids))
    return track


def axes_apart(place: Rows | Known | Moved) -> list[int]:
    """The axes along which examples are told apart."""
    if isinstance(place, Rows):
        return [place.axis]
    return [axis for axis, size in enumerate(place.shape) if size > 1]


def is_single(track: Track) -> bool:
    """Whether the whole value belongs to one example."""
    return isinstance(track.place, (Known, Moved)) and math.prod(track.place.shape) == 1
