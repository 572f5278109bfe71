"""For users' own unit tests: per-row autodiff as the oracle, and comparisons with it.

The oracle differentiates each row's loss by itself. It shares no code with the engine.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def per_example_grads(loss_fn: Callable, params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The gradient of every row's loss, by reverse-mode autodiff one row at a time.

    ``g[r] = d losses[r] / d params``, with ``losses = loss_fn(params, batch, *args, **kwargs)``.

    Args:
      loss_fn: returns losses [N].
      params: tree of floating-point arrays, each of some shape [*p].

    Returns:
      A tree like ``params``, leaves [N, *p], in the parameters' dtype. It takes N times the memory
      of the parameters: use small models.

    >>> import jax.numpy as jnp
    >>> per_example_grads(lambda w, x: x @ w, jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    Array([[1., 2.],
           [3., 4.]], dtype=float32)
    """

    def losses(params):
        return loss_fn(params, batch, *args, **kwargs)

    return jax.jit(jax.jacrev(losses))(params)


def per_example_dots(
    loss_fn: Callable, params: Any, batch: Any, val_batch_size: int, *args: Any, **kwargs: Any
) -> Any:
    """What ``GradDotProdEngine`` should return as ``dots``, from per-row gradients.

    ``dots[p][i] = < g[i][p] , (1/V) sum_v g[v][p] >`` for the B = N - V training rows i, with v
    over the last V = ``val_batch_size`` rows. Computed by NumPy in float64 from
    ``per_example_grads``.

    Returns:
      A tree like ``params`` of NumPy arrays [B], float64.

    >>> import jax.numpy as jnp
    >>> batch = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> per_example_dots(lambda w, x: x @ w, jnp.ones(2), batch, 1)
    array([17., 39.])
    """

    def dots(rows):
        rows = np.asarray(rows, np.float64).reshape(rows.shape[0], -1)
        return rows[:-val_batch_size] @ rows[-val_batch_size:].mean(axis=0)

    return jax.tree.map(dots, per_example_grads(loss_fn, params, batch, *args, **kwargs))


def relative_errors(dots: Any, expected: Any) -> dict[str, float]:
    """Per parameter, the largest error over the rows, relative to the largest expected value.

    Parameters whose dots are below a thousandth of the largest in the tree are measured against
    that thousandth: a gradient that is zero but for rounding has no meaningful relative error.
    """
    found, found_tree = jax.tree_util.tree_flatten_with_path(dots)
    wanted, wanted_tree = jax.tree_util.tree_flatten_with_path(expected)
    if found_tree != wanted_tree:
        raise AssertionError(f"trees differ.\n  expected {wanted_tree}\n  found    {found_tree}")
    pairs = {
        jax.tree_util.keystr(path): (np.asarray(leaf, np.float64), np.asarray(want, np.float64))
        for (path, leaf), (_, want) in zip(found, wanted)
    }
    for path, (leaf, want) in pairs.items():
        if leaf.shape != want.shape:
            raise AssertionError(f"dots{path}: expected shape {want.shape}, found {leaf.shape}")
    floor = 1e-3 * max((np.abs(want).max() for _, want in pairs.values()), default=0.0)
    errors = {}
    for path, (leaf, want) in pairs.items():
        scale = max(np.abs(want).max(), floor)
        error = np.abs(leaf - want).max()
        errors[path] = float(error / scale) if scale > 0 else float(error)
    return errors


def assert_dots_close(dots: Any, expected: Any, *, rtol: float = 1e-5) -> None:
    """Asserts that two trees of dots agree.

    ``max_i |dots[p][i] - expected[p][i]| <= rtol * scale`` for every parameter p, with ``scale``
    the largest ``|expected[p][i]|``, but at least a thousandth of the largest in the tree.

    Args:
      rtol: 1e-5 suits float32 models, 1e-2 bfloat16 ones.

    Raises:
      AssertionError: trees or shapes differ, values differ (every parameter that does is listed),
        or something is not a number.

    >>> import jax.numpy as jnp
    >>> assert_dots_close({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 2.000001])})
    """
    errors = relative_errors(dots, expected)
    faults = [f"  {path}: {error:.2e}" for path, error in errors.items() if not error <= rtol]
    if faults:
        raise AssertionError(
            f"dots differ from the expected ones by more than rtol={rtol:g}, relative errors:\n"
            + "\n".join(faults)
        )
