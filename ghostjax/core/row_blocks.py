"""Numbers of one row after another, of arrays that may be split over a mesh by rows and by more.

    numbers[b] = function(what each array has of row b)

A loop over rows that are sharded makes XLA gather them. So rows lie in as many blocks as the mesh
has devices, and a round of the loop takes one row of each:

    row      0 1 2 | 3 4 5 | 6 7 8 | ...
    round    0 1 2 | 0 1 2 | 0 1 2 | ...

Blocks stay where their rows are, however these are split, and features where they are: nothing is
gathered, and numbers come out sharded like the rows. Where types tell no mesh, XLA is asked where
rows are (``row_map``), which costs nothing on one device, and gathers only what else is split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ghostjax._jaxprs import holds
from ghostjax.core.place_rules import Rows
from ghostjax.core.row_map import on_their_devices


def map_parts(
    function: Callable[[list[Any]], Any], arrays: Sequence[Any], places: Sequence[Rows | None]
) -> Any:
    """A tree of scalars of what arrays have of one row after another, each [B].

    Args:
      function: of a list: of every array what it has of one row, with all axes.
      places: of every array, where its rows are, with ``outer`` 1; None where all rows need all.
    """
    pairs = list(zip(arrays, places, strict=True))
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(
        [_part(*pair, 0) for pair in pairs]
    )
    consts, treedef = list(closed.consts), jax.tree.structure(shapes)

    def of_row(*parts):
        own = core.ClosedJaxpr(closed.jaxpr, list(parts[: len(consts)]))
        return core.jaxpr_as_fun(own)(*parts[len(consts) :])

    def one_by_one(*arrays):
        pairs = list(zip(arrays, places))
        rows = jnp.arange(_num_rows(pairs))
        return jax.lax.map(lambda row: of_row(*(_part(*pair, row) for pair in pairs)), rows)

    num_rows = _num_rows(pairs)
    arrays, places = [*consts, *arrays], [*[None] * len(consts), *places]
    blocks = _blocks(closed.jaxpr, num_rows, arrays)
    if blocks == 1:
        return treedef.unflatten(on_their_devices(one_by_one, arrays, places))
    axes = [None if place is None else place.axis for place in places]
    split = [
        array if place is None else _split(array, place, blocks)
        for array, place in zip(arrays, places)
    ]

    def of_round(number):
        rows = [
            array if place is None else _part(array, place.at(place.axis + 1), number)
            for array, place in zip(split, places)
        ]
        return jax.vmap(of_row, in_axes=axes)(*rows)

    numbers = jax.lax.map(of_round, jnp.arange(num_rows // blocks))
    return treedef.unflatten([found.T.reshape(num_rows) for found in numbers])


def _blocks(jaxpr: core.Jaxpr, num_rows: int, arrays: Sequence[Any]) -> int:
    """As many as the mesh has devices that the types of arrays tell, or as divide the rows."""
    # A convolution of several rows with a kernel each has groups of features. Where these are
    # split, XLA's partitioner makes wrong numbers. Those of data are products here
    # (``convolutions.as_product``).
    if any(holds(eqn, "conv_general_dilated") for eqn in jaxpr.eqns):
        return 1
    return math.gcd(num_rows, max(jax.typeof(array).sharding.mesh.size for array in arrays) or 1)


def _num_rows(pairs: Sequence[tuple[Any, Rows | None]]) -> int:
    return next(a.shape[place.axis] // place.inner for a, place in pairs if place is not None)


def _part(array: jax.Array, place: Rows | None, row: Any) -> jax.Array:
    if place is None:
        return array
    return jax.lax.dynamic_slice_in_dim(array, row * place.inner, place.inner, place.axis)


def _split(array: jax.Array, place: Rows, blocks: int) -> jax.Array:
    before, after = array.shape[: place.axis], array.shape[place.axis + 1 :]
    return array.reshape(*before, blocks, array.shape[place.axis] // blocks, *after)
