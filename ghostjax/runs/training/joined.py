"""Scores through an optimizer that treats all coordinates alike, with small arrays as one vector.

The derivative of Adam's update is some twenty kernels for every array of the parameters, and most
of the time that a step of a small model takes to compile.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax._through import through_and_undefined

SMALL = 2**16  # elements: a copy of a larger array would cost more memory than compiling is worth


class Joined:
    """How a tree like the parameters is joined: a list of vectors and of arrays left as they are.

    Small arrays of one type are one vector, but for those of two bytes a number: a norm over them,
    as for clipping, is rounded array by array.

    Attributes:
      is_idle: whether there are no two arrays to join.
    """

    def __init__(self, params: Any):
        leaves, self._structure = jax.tree.flatten(params)
        self._shapes = [leaf.shape for leaf in leaves]
        groups: dict[Any, list[int]] = {}
        for n, leaf in enumerate(leaves):
            is_joined = leaf.size <= SMALL and leaf.dtype.itemsize >= 4
            groups.setdefault(leaf.dtype if is_joined else n, []).append(n)
        self._groups = list(groups.values())
        self.is_idle = len(groups) == len(leaves)

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

        def is_alike(node):
            return jax.tree.structure(node) == self._structure and self._shapes == [
                jnp.shape(leaf) for leaf in jax.tree.leaves(node)
            ]

        return jax.tree.map(
            lambda node: self.join(node) if is_alike(node) else node, opt_state, is_leaf=is_alike
        )


def through_joined(
    optimizer: optax.GradientTransformation, opt_state: Any, params: Any, grads: Any
) -> tuple[Any, jax.Array]:
    """As ``through_and_undefined``, of an optimizer to which the bounds of arrays mean nothing."""
    joined = Joined(params)
    if joined.is_idle:  # a scalar alone looks like a count of steps
        return through_and_undefined(optimizer, opt_state, params, grads)
    own = joined.join_state(opt_state), joined.join(params), joined.join(grads)
    through, undefined = through_and_undefined(optimizer, *own)
    return lambda val_grads: joined.split(through(joined.join(val_grads))), undefined
