"""Numbers of one row after another, of arrays that may be split over a mesh by rows and by more.

    numbers[b] = function(what each array has of row b)

A loop over rows that are sharded makes XLA gather them. So in a program of several devices rows lie
in as many blocks as there are devices, and a round of the loop takes one row of each, or some:

    row      0 1 2 | 3 4 5 | 6 7 8 | ...
    round    0 1 2 | 0 1 2 | 0 1 2 | ...

Blocks stay where their rows are, however these are split, and features where they are: nothing is
gathered, and numbers come out sharded like the rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import holds
from ghostjax.core.by_devices import by_devices, splits_rows
from ghostjax.core.place_rules import Rows


def map_rows(function: Callable[[Any], jax.Array], arrays: Any, at_once: int = 1) -> jax.Array:
    """``jax.lax.map`` to scalars, [B], of a tree of arrays [B, ...].

    Args:
      function: must not close over traced values.
      at_once: how many rows, at most, are taken at a time; of several devices, one each at least.
    """
    leaves, treedef = jax.tree.flatten(arrays)

    def one(*leaves):
        size = min(at_once, leaves[0].shape[0])
        return [jax.lax.map(function, treedef.unflatten(leaves), batch_size=size)]

    if not splits_rows(*leaves):
        return one(*leaves)[0]
    parts = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    closed = jax.make_jaxpr(lambda *parts: function(treedef.unflatten(parts)))(*parts)

    def of_row(*parts):
        return core.jaxpr_as_fun(closed)(*(part[0] for part in parts))

    return by_devices(one, _in_rounds(of_row, [Rows(0)] * len(leaves), at_once), leaves)[0]


def map_parts(
    function: Callable[[list[Any]], Any], arrays: Sequence[Any], places: Sequence[Rows | None]
) -> Any:
    """A tree of scalars of what arrays have of one row after another, each [B].

    Args:
      function: of a list: of every array what it has of one row, with all axes.
      places: of every array, where its rows are, with ``outer`` 1; None where all rows need all.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(
        [_part(*pair, 0) for pair in zip(arrays, places, strict=True)]
    )
    consts, treedef = list(closed.consts), jax.tree.structure(shapes)
    arrays, places = [*consts, *arrays], [*[None] * len(consts), *places]

    def of_row(*parts):
        own = core.ClosedJaxpr(closed.jaxpr, list(parts[: len(consts)]))
        return core.jaxpr_as_fun(own)(*parts[len(consts) :])

    def one(*arrays):
        pairs = list(zip(arrays, places))
        rows = jnp.arange(_num_rows(pairs))
        return jax.lax.map(lambda row: of_row(*(_part(*pair, row) for pair in pairs)), rows)

    # A convolution of several rows with a kernel each has groups of features. Where these are
    # split, XLA's partitioner makes wrong numbers. Those of data are products here
    # (``convolutions.as_product``).
    has_kernels = any(holds(eqn, "conv_general_dilated") for eqn in closed.jaxpr.eqns)
    several = (lambda _, *arrays: one(*arrays)) if has_kernels else _in_rounds(of_row, places)
    return treedef.unflatten(by_devices(one, several, arrays))


def _in_rounds(of_row, places: Sequence[Rows | None], at_once: int = 1):
    """The loop in rounds: a function of the number of devices and of arrays."""
    axes = [None if place is None else place.axis for place in places]
    of_rows = jax.vmap(jax.vmap(of_row, in_axes=axes), in_axes=axes)

    def loop(devices: int, *arrays):
        num_rows = _num_rows(list(zip(arrays, places)))
        blocks = math.gcd(num_rows, devices)
        each = num_rows // blocks
        most = max(1, min(each, at_once // blocks))
        count = max(count for count in range(1, most + 1) if each % count == 0)
        split = [
            array if place is None else _split(array, place, blocks, each // count, count)
            for array, place in zip(arrays, places)
        ]

        def of_round(number):
            rows = [
                array
                if axis is None
                else jax.lax.dynamic_index_in_dim(array, number, axis + 1, keepdims=False)
                for array, axis in zip(split, axes)
            ]
            return of_rows(*rows)

        numbers = jax.lax.map(of_round, jnp.arange(each // count))
        return [jnp.swapaxes(found, 0, 1).reshape(num_rows) for found in numbers]

    return loop


def _num_rows(pairs: Sequence[tuple[Any, Rows | None]]) -> int:
    return next(a.shape[place.axis] // place.inner for a, place in pairs if place is not None)


def _part(array: jax.Array, place: Rows | None, row: Any) -> jax.Array:
    if place is None:
        return array
    return jax.lax.dynamic_slice_in_dim(array, row * place.inner, place.inner, place.axis)


def _split(array: jax.Array, place: Rows, *sizes: int) -> jax.Array:
    """With an axis for each of the sizes, and the rows' own, in the place of that of the rows."""
    before, after = array.shape[: place.axis], array.shape[place.axis + 1 :]
    return array.reshape(*before, *sizes, place.inner, *after)
