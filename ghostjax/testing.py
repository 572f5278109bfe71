"""For users' own unit tests: per-row autodiff as the oracle, comparisons with it, collectives.

The oracle differentiates each row's loss by itself. It shares no code with the engine.
"""

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._collectives import Collective as Collective
from ghostjax._collectives import collectives as collectives

MAX_FAULTS = 8  # that a message lists


def per_example_grads(loss_fn: Callable, params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The gradient of every row's loss, by reverse-mode autodiff one row at a time.

    ``g[r] = d losses[r] / d params``, with ``losses = loss_fn(params, batch, *args, **kwargs)``.

    Args:
      loss_fn: returns losses [N].
      params: tree of floating-point arrays, each of some shape [*p].
      batch, args, kwargs: passed on to ``loss_fn``.

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

    Args:
      loss_fn, params, batch, args, kwargs: as for ``per_example_grads``.
      val_batch_size: V.

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

    Args:
      dots, expected: trees of arrays, alike in their shapes.

    Returns:
      By path of a parameter, max_i |dots[p][i] - expected[p][i]| over the largest |expected[p][i]|.

    Raises:
      AssertionError: the trees, or the shapes of leaves, differ.

    >>> relative_errors({"w": np.array([1.0, 2.5])}, {"w": np.array([1.0, 2.0])})
    {"['w']": 0.25}
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
      dots, expected: trees of arrays.
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


def assert_documents_apart(
    losses_fn: Callable[[Any], Any], inputs: Any, labels: Any, *, rtol: float = 1e-5
) -> None:
    """Asserts that documents in one row, and in other rows, do not see each other.

    Changes one document after another, and the padding, first at one position and then everywhere,
    and compares the losses at the positions of all others. Where it holds,
    ``value_grad_and_dots(...)(..., labels=labels)`` gives every document the dots of its own loss.
    It holds if attention has a segment mask, if no state goes on from one document to the next, and
    if the last token of a document does not predict the first one of the next.

    Args:
      losses_fn: ``losses_fn(inputs) -> losses [B, T]``, the loss of every position, 0 where there
        is none; or [B, T - 1], without that of the last position, and the like.
      inputs: what documents consist of, such as their tokens: an array [B, T, ...] of integers or
        floats, or a tree of them. Leave out what tells documents apart, labels and positions:
        it stays as it is. A document is changed by giving each of its numbers another one that
        occurs in its array, so that tokens stay in the vocabulary.
      labels: integers [B, T], the document of each position; negative: padding.
      rtol: how far losses may move, relative to the largest of them. With 0, not a bit.

    Raises:
      AssertionError: documents see each other; names them and the positions. Or no loss changes
        whatever is changed, so that nothing is tested.
      ValueError: shapes do not fit, or an array holds the same number everywhere.

    It makes two forward passes for every document. It does not see whether positions restart in
    each document: if they go on, losses depend on where a document is, but not on what is before.

    >>> import jax.numpy as jnp
    >>> tokens, labels = jnp.array([[3, 1, 2, 4]]), jnp.array([[0, 0, 1, 1]])
    >>> assert_documents_apart(lambda tokens: jnp.square(tokens), tokens, labels)
    >>> assert_documents_apart(lambda tokens: jnp.cumsum(tokens, axis=1), tokens, labels)
    Traceback (most recent call last):
    AssertionError: documents see each other, losses [B, T] change with other documents:
      document 1 at row 0, positions 2, 3 by up to 0.1 of the largest loss, with document 0
    Mask attention between documents, restart states, and leave out the loss of a document's last
    token where it predicts another document.
    """
    labels = np.asarray(labels)
    arrays, treedef = jax.tree.flatten(jax.tree.map(np.asarray, inputs))
    shapes = [array.shape for array in arrays]
    if (
        labels.ndim != 2
        or not np.issubdtype(labels.dtype, np.integer)
        or not arrays
        or any(shape[:2] != labels.shape for shape in shapes)
    ):
        raise ValueError(
            "labels must be integers [B, T], and inputs arrays [B, T, ...]. Found labels "
            f"{labels.dtype}{list(labels.shape)} and inputs of shapes {shapes}."
        )
    labels = np.maximum(labels, -1)  # all padding is one
    others = [_other_values(array) for array in arrays]
    losses_fn = jax.jit(losses_fn)

    def losses_of(changed):
        """Losses with other inputs where ``changed`` [B, T] is."""
        chosen = [
            np.where(changed.reshape(changed.shape + (1,) * (array.ndim - 2)), other, array)
            for array, other in zip(arrays, others)
        ]
        return np.asarray(losses_fn(jax.tree.unflatten(treedef, chosen)), np.float64)

    before = losses_of(np.zeros(labels.shape, bool))
    if before.ndim != 2 or len(before) != len(labels) or before.shape[1] > labels.shape[1]:
        raise ValueError(
            f"losses_fn must return losses of shape {list(labels.shape)}, or of fewer positions. "
            f"Found {list(before.shape)}."
        )
    if not np.isfinite(before).all():
        raise AssertionError("losses are not finite, so that they cannot be compared.")
    own = labels[:, : before.shape[1]]
    largest = np.abs(before).max() or 1.0
    faults, is_used = [], False
    for changed in np.unique(labels):
        everywhere = labels == changed
        # A change of one position cannot cancel with others, as in a mean over positions.
        once = np.zeros(labels.shape, bool)
        once.flat[everywhere.argmax()] = True
        # NaN where a change made it: that is seen, too.
        moved = np.abs([losses_of(once) - before, losses_of(everywhere) - before]).max(0) / largest
        is_used |= bool((moved != 0).any())
        is_seen = ~(moved <= rtol) & (own != changed) & (own >= 0)
        for seer in np.unique(own[is_seen]):
            faults.append(_describe(seer, changed, is_seen & (own == seer), moved))
    if not is_used:
        raise AssertionError(
            "no loss changes with any document: losses_fn does not depend on these inputs."
        )
    if faults:
        listed = faults[:MAX_FAULTS] + [f"  and {len(faults) - MAX_FAULTS} more pairs"] * (
            len(faults) > MAX_FAULTS
        )
        raise AssertionError(
            "documents see each other, losses [B, T] change with other documents:\n"
            + "\n".join(listed)
            + "\nMask attention between documents, restart states, and leave out the loss of a "
            "document's last\ntoken where it predicts another document."
        )


def _other_values(array: np.ndarray) -> np.ndarray:
    """Everywhere another one of the array's values."""
    values, places = np.unique(array, return_inverse=True)
    if len(values) < 2:
        raise ValueError(
            f"inputs of shape {list(array.shape)} hold one number alone, so that a document cannot "
            "be changed: draw them at random."
        )
    moves = np.random.default_rng(0).integers(1, len(values), array.shape)
    return values[(places.reshape(array.shape) + moves) % len(values)]


def _describe(seer: int, changed: int, where: np.ndarray, moved: np.ndarray) -> str:
    rows = []
    for row in np.flatnonzero(where.any(axis=1)):
        positions = np.flatnonzero(where[row])
        more = ", ..." if len(positions) > MAX_FAULTS else ""
        rows.append(f"row {row}, positions {', '.join(map(str, positions[:MAX_FAULTS]))}{more}")
    name = f"document {changed}" if changed >= 0 else "the padding"
    return (
        f"  document {seer} at {'; '.join(rows)} by up to {moved[where].max():.2g} of the largest "
        f"loss, with {name}"
    )


def assert_rowwise(
    fn: Callable[..., Any],
    args: Sequence[Any],
    axis: Any = 0,
    out_axis: Any | EllipsisType = ...,
    *,
    derivatives: bool = True,
    rtol: float = 1e-5,
) -> None:
    """Tries out the promise of ``ghostjax.rowwise``: that ``fn`` keeps rows in place.

    ``fn(*args)`` is computed again with one row of all arguments replaced by the next one, for
    every row in turn, and no other row of the results may change; nor, with the cotangents of the
    results replaced in the same way, any other row of the cotangents of the arguments.

    Args:
      fn: pure, of positional arguments.
      args: the arguments, trees of arrays, with two or more rows that differ.
      axis, out_axis: as in ``ghostjax.rowwise``.
      derivatives: whether to try the backward pass as well; False for what has none.
      rtol: how much a row may change, relative to the largest entry of its array.

    Raises:
      AssertionError: a row changes another one; names the array and the rows. A promise that it
        does not break may still be broken elsewhere, as by other shapes.
      ValueError: there are fewer than two rows.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    >>> assert_rowwise(jnp.tanh, [x])
    >>> assert_rowwise(lambda x: x - x.mean(0, keepdims=True), [x])
    Traceback (most recent call last):
    AssertionError: result changes in row 1 by 1.5, where only row 0 of the arguments has changed
    """
    if out_axis is ...:
        out_axis = axis if isinstance(axis, int) else 0
    args = jax.tree.map(jnp.asarray, tuple(args))
    places = _axes_of(tuple(axis) if isinstance(axis, list) else axis, args)
    leaves, treedef = jax.tree.flatten(args)
    moving = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    rows = {leaf.shape[place] for leaf, place in zip(leaves, places) if place is not None}
    if len(rows) != 1 or min(rows) < 2:
        raise ValueError(f"arguments with two or more rows are needed, of one size. Found {rows}.")

    @jax.jit
    def computed(leaves, cotangents):
        def of_moving(arrays):
            given = list(leaves)
            for k, array in zip(moving, arrays):
                given[k] = array
            results = fn(*jax.tree.unflatten(treedef, given))
            return [r for r in jax.tree.leaves(results) if jnp.issubdtype(r.dtype, jnp.inexact)]

        results = fn(*jax.tree.unflatten(treedef, leaves))
        if not derivatives:
            return results, []
        _, pull = jax.vjp(of_moving, [leaves[k] for k in moving])
        return results, pull(cotangents)[0]

    results = jax.eval_shape(lambda leaves: fn(*jax.tree.unflatten(treedef, leaves)), leaves)
    of_results = _axes_of(out_axis, results)
    inexact = [
        (leaf, place)
        for leaf, place in zip(jax.tree.leaves(results), of_results)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    keys = jax.random.split(jax.random.key(0), len(inexact) or 1)
    cotangents = [
        jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
        for key, (leaf, _) in zip(keys, inexact)
    ]
    before = computed(leaves, cotangents)
    for row in range(rows.pop()):
        changed = [_changed(*pair, row) for pair in zip(leaves, places)]
        pulled = [_changed(leaf, place, row) for leaf, (_, place) in zip(cotangents, inexact)]
        after = computed(changed, pulled)
        _assert_others_same("result", before[0], after[0], of_results, row, rtol)
        of_moving = [places[k] for k in moving]
        _assert_others_same("cotangent", before[1], after[1], of_moving, row, rtol)


def _axes_of(axes: Any, tree: Any) -> list[int | None]:
    """By leaf of a tree, its entry in a prefix of the tree."""
    found: list[int | None] = []

    def take(axis, part):
        found.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(take, axes, tree, is_leaf=lambda node: node is None)
    return found


def _changed(leaf: Any, axis: int | None, row: int) -> Any:
    if axis is None:
        return leaf
    leaf = jnp.moveaxis(leaf, axis, 0)
    return jnp.moveaxis(leaf.at[row].set(leaf[(row + 1) % leaf.shape[0]]), 0, axis)


def _assert_others_same(what, before, after, places, row, rtol) -> None:
    pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (before, after)), places)
    for (path, old), (_, new), place in pairs:
        if place is None or jax.dtypes.issubdtype(old.dtype, jax.dtypes.extended):
            continue
        old, new = (np.moveaxis(np.asarray(a, np.float64), place, 0) for a in (old, new))
        change = np.abs(new - old).reshape(len(old), -1).max(axis=1, initial=0)
        change[row] = 0
        if not change.max() <= rtol * np.abs(old).max(initial=0):
            worst = int(np.argmax(change))
            raise AssertionError(
                f"{what}{jax.tree_util.keystr(path)} changes in row {worst} by {change[worst]:.3g},"
                f" where only row {row} of the arguments has changed"
            )
