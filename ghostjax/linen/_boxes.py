"""The box in which a parameter travels to the module that uses it.

Flax lets parameters be wrapped in ``AxisMetadata`` boxes and slices, stacks and unwraps them under
its transforms. Whatever rides in a box is therefore at hand, with the right leading axes taken off,
wherever its parameter is used: under ``nn.scan``, ``nn.remat`` and ``nn.vmap`` alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from ghostjax._errors import UncoveredParameterError, UnsupportedModuleError


class _UsedOutsideModule(UncoveredParameterError, AttributeError):
    """Also an AttributeError, so that ``hasattr`` on a box stays a question."""


@jax.tree_util.register_pytree_node_class
class ParameterBox(meta.AxisMetadata):
    """A parameter, what rides along, its path, and the axes taken off so far.

    Attributes:
      value: the parameter, possibly in a box of the user's (``nn.Partitioned``).
      carried: tree of arrays that ride along, sliced as the parameter is.
      path: the parameter's path in the tree the loss function gets.
      lifted: ``(index, length)`` of every axis a transform took off, outermost first.
      token: tells the traces of one engine call from all others, so that no cache of a jitted
        function inside the loss serves one trace with another's result.
    """

    def __init__(self, value, carried, path: str, lifted=(), token: Any = None):
        self.value = value
        self.carried = carried
        self.path = path
        self.lifted = lifted
        self.token = token

    def tree_flatten(self):
        return (self.value, self.carried), (self.path, self.lifted, self.token)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    def array(self) -> jax.Array:
        """The bare parameter, out of all boxes."""
        return meta.unbox(self.value)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return ParameterBox(val, self.carried, self.path, self.lifted, self.token)

    def remove_axis(self, index, params):
        if index < 0:
            raise UnsupportedModuleError(
                f"a Flax transform slices parameter {self.path} along axis {index}: give the axis "
                "in variable_axes counted from the front."
            )
        shape = jax.tree.leaves(self.value)[0].shape
        value = meta.remove_axis(self.value, index, params)
        lifted = (*self.lifted, (index, shape[index]))
        return ParameterBox(value, self.carried, self.path, lifted, self.token)

    def add_axis(self, index, params):
        value = meta.add_axis(self.value, index, params)
        return ParameterBox(value, self.carried, self.path, self.lifted[:-1], self.token)

    def _outside(self):
        return _UsedOutsideModule(
            f"parameter {self.path} is used outside the module that owns it (read from the "
            "parameter tree, or changed by nn.map_variables), where its per-row gradient cannot be "
            "captured. Use it through its module: for a tied output head, Embed.attend."
        )

    def __jax_array__(self):
        raise self._outside()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._outside()


def is_box(node: Any) -> bool:
    return isinstance(node, ParameterBox)


def is_leaf(node: Any) -> bool:
    """Parameters are leaves whether or not the user has boxed them."""
    return isinstance(node, meta.AxisMetadata)


def insert_lifted(shape: tuple[int, ...], lifted) -> tuple[int, ...]:
    """The shape outside all transforms of an array that has ``shape`` where it is used."""
    for index, length in reversed(lifted):
        shape = (*shape[:index], length, *shape[index:])
    return shape


def remove_lifted(shape: tuple[int, ...], lifted) -> tuple[int, ...]:
    """The shape where it is used of an array that has ``shape`` outside all transforms."""
    for index, _ in lifted:
        shape = (*shape[:index], *shape[index + 1 :])
    return shape


def lifted_to_front(array: jax.Array, lifted) -> jax.Array:
    """Moves the axes that ``insert_lifted`` put in to the front, as one axis."""
    inner = array.ndim - len(lifted)
    for done, (index, _) in enumerate(lifted):
        array = jnp.moveaxis(array, done + index, done)
    return array.reshape(-1, *array.shape[array.ndim - inner :])
