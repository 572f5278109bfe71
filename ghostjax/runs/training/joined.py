"""An optimizer that treats all coordinates alike, with small arrays as one vector.

Adam's update and its derivative are some thirty kernels for every array of the parameters, and were
most of the time that a step of a small model takes to compile.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SMALL = 2**16  # elements: a copy of a larger array would cost more memory than compiling is worth


class Joined:
    """How a tree like the parameters is joined: a list of vectors and of arrays left as they are.

    Small arrays of one type are one vector, but for those of two bytes a number: a norm over them,
    as for clipping, is rounded array by array.

    Attributes:
      count: of the arrays when joined.
    """

    def __init__(self, params: Any):
        leaves, self._structure = jax.tree.flatten(params)
        self._shapes = [leaf.shape for leaf in leaves]
        groups: dict[Any, list[int]] = {}
        for n, leaf in enumerate(leaves):
            is_joined = leaf.size <= SMALL and leaf.dtype.itemsize >= 4
            groups.setdefault(leaf.dtype if is_joined else n, []).append(n)
        self._groups = list(groups.values())
        self.count = len(groups)

    def join(self, tree: Any) -> list[jax.Array]:
        leaves = jax.tree.leaves(tree)

        def joined(group):
            if len(group) == 1:
                return leaves[group[0]]
            return jnp.concatenate([leaves[n].reshape(-1) for n in group])

        return [joined(group) for group in self._groups]

    def split(self, arrays: list[jax.Array]) -> Any:
        leaves: dict[int, jax.Array] = {}
        for group, array in zip(self._groups, arrays, strict=True):
            if len(group) == 1:
                leaves[group[0]] = array
                continue
            ends = np.cumsum([math.prod(self._shapes[n]) for n in group])
            parts = jnp.split(array, ends[:-1])
            leaves |= {n: part.reshape(self._shapes[n]) for n, part in zip(group, parts)}
        return self._structure.unflatten([leaves[n] for n in range(len(leaves))])

    def join_state(self, opt_state: Any) -> Any:
        """With every tree in it that is like the parameters joined."""
        return self._map_alike(self.join, opt_state)

    def split_state(self, joined_state: Any, opt_state: Any) -> Any:
        """``join_state`` undone; ``opt_state`` is what it was made of, or like it."""
        alike = self._map_alike(lambda _: _ALIKE, opt_state)
        return jax.tree.map(
            lambda mark, node: self.split(node) if mark is _ALIKE else node, alike, joined_state
        )

    def each(self, function: Callable[[Any], Any], stacked: Any) -> Any:
        """Of joined and stacked trees; a sum over a long vector is slow for several at once."""
        return jax.lax.map(function, stacked)

    def _map_alike(self, function: Callable[[Any], Any], opt_state: Any) -> Any:
        def is_alike(node):
            return jax.tree.structure(node) == self._structure and self._shapes == [
                jnp.shape(leaf) for leaf in jax.tree.leaves(node)
            ]

        return jax.tree.map(
            lambda node: function(node) if is_alike(node) else node, opt_state, is_leaf=is_alike
        )


_ALIKE = object()


class Apart:
    """Arrays as they are, with the methods of ``Joined``."""

    def join(self, tree: Any) -> Any:
        return tree

    split = join_state = join

    def split_state(self, state: Any, opt_state: Any) -> Any:
        del opt_state
        return state

    def each(self, function: Callable[[Any], Any], stacked: Any) -> Any:
        return jax.vmap(function)(stacked)


def is_worth_joining(params: Any) -> bool:
    """Whether there are two arrays to join: else a scalar may look like what is joined."""
    return Joined(params).count < len(jax.tree.leaves(params))
