"""Checks of arguments, from static facts alone: they run while a function is traced."""

import operator
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._errors import BatchError, ParameterError
from ghostjax._modules import two_lines


def check_val_batch_size(val_batch_size: Any, num_rows: int | None = None) -> int:
    """The number V of validation rows, which must leave at least one of N rows for training."""
    try:
        val_rows = operator.index(val_batch_size)
    except TypeError:
        raise TypeError(
            f"val_batch_size must be a Python int (it is a static shape), got {val_batch_size!r} "
            f"of type {type(val_batch_size).__name__}."
        ) from None
    if val_rows <= 0:
        raise BatchError(
            f"val_batch_size must be at least 1: the last val_batch_size rows of the batch are the "
            f"validation rows. Got {val_rows}."
        )
    if num_rows is not None and val_rows >= num_rows:
        raise BatchError(
            "val_batch_size must be smaller than the number of rows, so that at least one "
            f"training row is left. Got val_batch_size={val_rows} for a batch of {num_rows} rows."
        )
    return val_rows


def batch_rows(batch: Any) -> int:
    """The leading size N that all leaves of ``batch`` share."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise BatchError("batch has no arrays: expected a tree of arrays with leading axis N.")
    shapes = {jax.tree_util.keystr(path) or "batch": jnp.shape(leaf) for path, leaf in leaves}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) > 1 or () in sizes:
        listing = "\n".join(f"  {name}: {shape}" for name, shape in shapes.items())
        raise BatchError(
            "the leaves of batch must share their leading size, the number of rows. Found\n"
            f"{listing}\nPass what has no row axis (random keys, scalars) as further arguments."
        )
    (rows,) = sizes.pop()
    if not rows:
        raise BatchError(f"batch has no rows: its leaves have leading size 0. Found {shapes}.")
    return rows


def check_argnums(argnums: Any, batch_argnums: Any, num_args: int) -> tuple[tuple, tuple]:
    """The positions of the parameters and of the batch among ``num_args`` positional arguments."""

    def positions(numbers):
        numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        return tuple(range(num_args)[number] for number in numbers)

    what = f"argnums={argnums} and batch_argnums={batch_argnums}"
    try:
        found = positions(argnums), positions(batch_argnums)
    except IndexError:
        raise TypeError(
            f"{what} must name positional arguments, of which there are {num_args}. Pass "
            "parameters and batch by position, not by name."
        ) from None
    if len({*found[0], *found[1]}) < len(found[0]) + len(found[1]):
        raise ValueError(f"{what} name an argument twice, of {num_args} positional arguments.")
    return found


def check_parameters(params: Any) -> None:
    """Every leaf must be a real floating-point array."""
    faults = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:  # a function, or a name
            dtype = type(leaf).__name__
        if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
            faults.append(f"  {jax.tree_util.keystr(path) or 'params'}: {dtype}")
    if faults:
        raise ParameterError(
            "parameters must be real floating-point arrays. Found\n"
            + "\n".join(faults)
            + "\nPass other state to the loss function as a further argument, or close over it."
            + two_lines(params)
        )


def check_direction(
    params: Any,
    direction: Any,
    name: str = "direction",
    *,
    dtypes: bool = True,
    stacked: bool = False,
) -> int | None:
    """``direction`` must have the parameters' tree and shapes, and with ``dtypes`` their dtypes.

    Returns:
      With ``stacked``, K where every leaf has one more axis, of K directions, in front. Else None.
    """
    expected, found = jax.tree.structure(params), jax.tree.structure(direction)
    if expected != found:
        raise ValueError(
            f"{name} must be a tree like the parameters.\n  expected {expected}\n  found    {found}"
        )
    paths = jax.tree_util.tree_leaves_with_path(params)
    pairs = list(zip([leaf for _, leaf in paths], jax.tree.leaves(direction)))
    leading = {
        jnp.shape(vector)[0] if stacked and jnp.ndim(vector) == jnp.ndim(leaf) + 1 else None
        for leaf, vector in pairs
    }
    directions = leading.pop() if len(leading) == 1 else None

    def kind(leaf, leading=()):
        return (*leading, *jnp.shape(leaf)), jnp.result_type(leaf) if dtypes else None

    before = () if directions is None else (directions,)
    faults = [
        f"  {jax.tree_util.keystr(path) or name}: expected "
        f"{jnp.result_type(leaf)}{[*before, *jnp.shape(leaf)]}, found "
        f"{jnp.result_type(vector)}{list(jnp.shape(vector))}"
        for (path, _), (leaf, vector) in zip(paths, pairs)
        if kind(leaf, before) != kind(vector)
    ]
    if faults or directions == 0:
        what = "shapes and dtypes" if dtypes else "shapes"
        other = " (or, all of them, one more axis in front, of K directions)" if stacked else ""
        raise ValueError(
            f"{name} must have the {what} of the parameters{other}:\n" + "\n".join(faults)
        )
    return directions
