"""Promises about operations that cannot be looked into: rowwise and register_row_rule."""

import functools
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ghostjax.core import PREFIX, ROW_RULES, RowRule, is_known

Axes = Any  # an integer, None, or a tree of these that is a prefix of what it describes


def rowwise(
    fn: Callable[..., Any], axis: Axes = 0, out_axis: Axes | EllipsisType = ...
) -> Callable[..., Any]:
    """``fn``, with the promise that it keeps rows in place; nothing else is changed.

        fn(x)[r] depends on x[r] alone, for every place r along the axis; so do its derivatives.

    Around what ghostjax cannot look into: a Pallas kernel whose rows do not follow from its grid, a
    callback, an ``ffi_call``. The promise is believed, not checked: one that is broken makes dots
    that are silently wrong. ``testing.assert_rowwise`` tries it out.

    Args:
      fn: of positional arguments, trees of arrays. What has rows must be an argument; only what
        has none may be closed over.
      axis: the axis of the arguments that indexes rows: an integer, or as ``in_axes`` of
        ``jax.vmap`` a tuple with an entry for every argument, which may be trees; None for what has
        no rows, such as parameters. Counted without the axes that ``jax.vmap`` takes away.
      out_axis: the same for the results; as ``axis`` where that is an integer, otherwise 0. A
        result without rows (None) may be used where no row has to have a gradient of its own.

    Returns:
      A function of the same arguments, for ``jit``, ``scan``, ``remat``, ``vmap`` and ``grad``.
      Where parameters of ``value_grad_and_dots`` are among the arguments, the call is one meeting:
      ``fn`` is differentiated forwards there, and must not be, or call, a ``custom_vjp`` function;
      keep parameters out of it where you can.

    Raises:
      ValueError: in a call, arrays have no such axis, or its size is not one among arguments and
        results.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> def doubled(x):  # by NumPy
    ...     return jax.pure_callback(lambda x: 2 * np.asarray(x), jax.typeof(x), x)
    >>> rowwise(doubled)(jnp.array([[1.0], [2.0]]))
    Array([[2.],
           [4.]], dtype=float32)
    """
    if out_axis is ...:
        out_axis = axis if isinstance(axis, int) else 0

    def marked(*args):
        sizes: dict[int, str] = {}
        args = _marked(fn, args, axis, "axis", sizes)
        return _marked(fn, fn(*args), out_axis, "out_axis", sizes)

    marked.__name__ = marked.__qualname__ = PREFIX + _name(fn)
    jitted = jax.jit(marked)

    @functools.wraps(fn)
    def called(*args: Any) -> Any:
        return jitted(*args)

    return called


def register_row_rule(primitive: Any, rule: RowRule) -> None:
    """Says where rows go in a primitive that ghostjax does not know, in every later trace.

        rule(axes, shapes, params) -> the axis of every output that indexes rows

    A promise, as that of ``rowwise``: place r along these axes of the outputs depends on place r
    along those of the operands alone, in the operation and in its derivatives. It is asked only
    where rows do not follow from what is known: about primitives of your own, ``ffi_call``,
    ``pure_callback``, and about a ``pallas_call`` that cannot be followed.

    Args:
      primitive: a ``jax.extend.core.Primitive``, or its name.
      rule: gets for every operand the axis that indexes rows, a tuple with None for those without
        rows; their shapes; and the parameters of the equation, by name, as a jaxpr shows them.
        Returns a sequence with an axis for every output, or one answer for all: an integer; None
        where rows are lost; ``NotImplemented`` to say nothing about this equation.

    Raises:
      ValueError: rows of that primitive are known, or it has a rule; or, when it is used, the
        rule's answer is not an axis for every output.

    >>> def attention(axes, shapes, params):
    ...     return 0 if set(axes) <= {0, None} else None  # the batch is in front
    >>> register_row_rule("my_attention", attention)
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    if is_known(name):
        raise ValueError(
            f"Where rows go in the primitive {name} is known, and no rule can change that."
        )
    if ROW_RULES.get(name, rule) is not rule:
        raise ValueError(f"The primitive {name} has a row rule already: {ROW_RULES[name]}.")
    ROW_RULES[name] = rule


def _marked(fn, tree: Any, axes: Axes, what: str, sizes: dict[int, str]) -> Any:
    """``tree`` as it is, with the axes of its leaves in the jaxpr; see ``core/promises.py``.

    ``sizes`` collects the sizes along them, of which there may be one.
    """

    def of_leaf(path, leaf, axis):
        if axis is None:
            return lax.optimization_barrier(leaf) if what == "out_axis" else leaf
        place = f"{what}{jax.tree_util.keystr(path)}"
        if not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"rowwise({_name(fn)}): {place} is {axis!r}, but the array has shape {leaf.shape}. "
                "None is for what has no rows."
            )
        sizes.setdefault(leaf.shape[axis], f"{place} = {axis} of shape {leaf.shape}")
        if len(sizes) > 1:
            raise ValueError(
                f"rowwise({_name(fn)}): the axis of rows must have one size. Found "
                f"{' and '.join(sizes.values())}. None is for what has no rows."
            )
        (whole,) = lax.split(leaf, (leaf.shape[axis],), axis % leaf.ndim)
        return whole

    def of_part(path, axis, part):
        return jax.tree_util.tree_map_with_path(
            lambda rest, leaf: of_leaf((*path, *rest), jnp.asarray(leaf), axis), part
        )

    axes = tuple(axes) if isinstance(axes, list) else axes
    try:
        return jax.tree_util.tree_map_with_path(
            of_part, axes, tree, is_leaf=lambda node: node is None
        )
    except (TypeError, ValueError) as error:
        if str(error).startswith("rowwise("):
            raise
        raise ValueError(
            f"rowwise({_name(fn)}): {what} = {axes} must be an integer, None, or a tree of these "
            f"that is a prefix of {jax.tree.structure(tree)}. {error}"
        ) from None


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
