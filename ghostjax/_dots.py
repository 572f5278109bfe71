"""value_grad_and_dots: the direction form, for any JAX function."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._aggregate import aggregate
from ghostjax._checks import check_direction
from ghostjax._labels import by_row_label, check_labels, counted, or_nan, positions_of
from ghostjax._loss import Arrays, Loss, check_reduction, trace_loss
from ghostjax.core import Directed, Labels, zeros_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradDots:
    """What ``value_grad_and_dots`` returns.

    Attributes:
      value: scalar, the loss.
      aux: what the loss function returned beside it, or None.
      grads: what ``jax.grad`` returns.
      dots: tree of the parameters, every leaf [B], or [K, B] of K stacked directions; in float32
        (float64 for float64 parameters). With labels [S], or [K, S].
      shared: tree of scalars, or [K]: the part of <grads, direction> that belongs to no row, such
        as weight decay inside the loss, or to no label.
      conflicts: scalar, int32: at how many places gradient flows through values of several
        examples at once, so that no example has a gradient of its own. Dots are NaN then. Only
        where rows are moved by data, or labels are given, can it be anything but 0.
      loss_reduction: "mean" or "sum", static: the scale of the dots.
      num_rows: B, static.
    """

    value: jax.Array
    aux: Any
    grads: Any
    dots: Any
    shared: Any
    conflicts: jax.Array
    loss_reduction: str = dataclasses.field(metadata={"static": True})
    num_rows: int = dataclasses.field(metadata={"static": True})

    def total(self) -> jax.Array:
        """The dots summed over all parameters, [B]; of K stacked directions [K, B]."""
        return (jax.vmap(aggregate) if _is_stacked(self.dots) else aggregate)(self.dots)


def conservation_error(result: GradDots, direction: Any) -> Any:
    """The certificate: how far the dots are from adding up to what autodiff says, per parameter.

    With s = 1/B for loss_reduction "mean" and 1 for "sum", ``s * sum_i dots[i] + shared`` must be
    ``<grads, direction>``, and ``grads`` is computed without any of the dots' machinery but on the
    rows route (see ``explain``), where both come out of one loop.

    Args:
      direction: that of the result; with a leading axis K on every leaf where it was so there.

    Returns:
      A tree of the parameters of float32 scalars (of K stacked directions [K]): the difference,
      relative to ``s * sum_i |dots[i]| + |shared|`` or, where larger, to ``|<grads, direction>|``;
      but at least to a thousandth of the largest of these in the tree, as a gradient that is zero
      but for rounding has no meaningful relative error. A use of a parameter that was missed shows
      as an error of order one, by name.

    >>> import jax.numpy as jnp
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> direction = jnp.array([[1.0, 0.5], [3.0, 1.0]])
    >>> result = value_grad_and_dots(lambda w, x: jnp.mean(x @ w))(w, x, direction=direction)
    >>> conservation_error(result, direction)
    Array([0., 0.], dtype=float32)
    """

    scale = 1 / result.num_rows if result.loss_reduction == "mean" else 1.0

    def of_one(direction, dots, shared):
        return _conservation_error(result.grads, direction, dots, shared, scale)

    of_all = jax.vmap(of_one) if _is_stacked(result.dots) else of_one
    return of_all(direction, result.dots, result.shared)


def _is_stacked(dots: Any) -> bool:
    return {jnp.ndim(leaf) for leaf in jax.tree.leaves(dots)} == {2}


@functools.partial(jax.jit, static_argnums=4)
def _conservation_error(grads: Any, direction: Any, dots: Any, shared: Any, scale: float) -> Any:
    def parts(grad, vector, dots, shared):
        wide = dots.dtype
        found = scale * jnp.sum(dots) + shared
        expected = jnp.sum(grad.astype(wide) * vector.astype(wide))
        size = jnp.maximum(scale * jnp.sum(jnp.abs(dots)) + jnp.abs(shared), jnp.abs(expected))
        return jnp.abs(found - expected), size

    leaves, treedef = jax.tree.flatten(grads)
    others = (treedef.flatten_up_to(tree) for tree in (direction, dots, shared))
    differences, sizes = zip(*map(parts, leaves, *others))
    floor = jnp.maximum(1e-3 * jnp.max(jnp.stack(sizes)), float(jnp.finfo(jnp.float32).tiny))
    errors = [difference / jnp.maximum(size, floor) for difference, size in zip(differences, sizes)]
    return jax.tree.unflatten(treedef, errors)


def value_grad_and_dots(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
) -> Callable[..., GradDots]:
    """``jax.value_and_grad``, and the inner product of every row's gradient with a direction.

        dots[p][i] = < d l_i / d p , direction[p] >            or, of K directions at once,
        dots[p][k, i] = < d l_i / d p , direction[p][k] >

    for any JAX function, out of the backward pass that gives the gradient. Where the direction
    depends on that gradient, see ``value_and_dots_fn``.

    Args:
      loss_fn: ``loss_fn(params, batch, ...) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        With ``per_example``, the loss of one row: the batch arguments come without their leading
        axis, and the returned value is the mean (or sum) over rows, aux stacked over rows.
      argnums: which positional arguments are the parameters: trees of floating-point arrays. Or an
        Equinox or NNX module, of which the parameters are, and the gradient is, what they are for
        ``eqx.filter_grad`` and ``nnx.grad``; state that the loss changes is an error there.
      batch_argnums: which are the batch: trees of arrays that share their leading size B.
      loss_reduction: "mean": the loss is a mean over rows and dots[i] refers to row i's own loss,
        B times its share; "sum": dots[i] is row i's share of <grads, direction>. A row's share is
        the derivative of the loss as that row alone sees the parameters move along the direction,
        which is defined for losses that are no sum over rows, too (their maximum, say).

    Returns:
      ``fn(*args, direction, labels=None, num_labels=None, **kwargs) -> GradDots``, with
      ``direction`` a tree like the parameters (a tuple of trees for several argnums), same shapes
      and dtypes; or with a leading axis K on every leaf, of K directions, and then dots are [K, B]
      and only the products with the directions are computed K times. With ``labels``, integers [B]
      or [B, T], dots are those of ``num_labels`` = S examples, [S]: label s has all that belongs
      to places with that number; negative ones are padding, of nobody. Labels [B, T] are for batch
      arrays [B, T, ...]: a parameter's use counts for the position where it is used, so that
      documents in one row have the dots of documents apart, if they do not see each other. It is
      a pure function for use under ``jax.jit``.

    Guarantees: value, aux and grads are computed by the operations of ``jax.value_and_grad``; but a
    matrix product over many positions or with many directions makes its weight gradient row by row,
    if that costs less, and the sum over rows equals that of ``jax.grad`` to rounding. Where
    parameters are used is found in the jaxpr, whatever library made it; which axis holds rows is
    tracked through every operation. What cannot be followed is an error, never a skip.

    Raises:
      RowAxisError: rows are mixed, or lost where a parameter is used; names the operation.
      ValueError, TypeError: the batch or the direction does not fit.
      NotImplementedError: a parameter goes into an operation that cannot be walked.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.square(x @ w) / 2)
    >>> fn = value_grad_and_dots(loss_fn)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> result = fn(w, x, direction=jnp.array([1.0, 0.5]))
    >>> result.value, result.grads, result.dots
    (Array(2.5, dtype=float32), Array([2., 3.], dtype=float32), Array([1., 6.], dtype=float32))
    >>> fn(w, x, direction=jnp.eye(2)).dots
    Array([[1., 3.],
           [0., 6.]], dtype=float32)

    Source: Data Shapley in One Training Run, arXiv:2406.11011, for what the dots are good for.
    """
    check_reduction(loss_reduction)

    @functools.wraps(loss_fn)
    def fn(
        *args: Any,
        direction: Any,
        labels: Any = None,
        num_labels: int | None = None,
        **kwargs: Any,
    ) -> GradDots:
        loss, arrays = trace_loss(
            loss_fn,
            args,
            kwargs,
            argnums=argnums,
            batch_argnums=batch_argnums,
            has_aux=has_aux,
            per_example=per_example,
            loss_reduction=loss_reduction,
        )
        params = jax.tree.unflatten(loss.params, arrays.params)
        directions = check_direction(params, direction, stacked=True)
        return directed(loss, arrays, direction, directions, check_labels(loss, labels, num_labels))

    own = {"direction": inspect.Parameter.empty, **LABELS}
    fn.__signature__ = with_keywords(loss_fn, own)  # jax.jit looks for donated names there
    return fn


def directed(
    loss: Loss,
    arrays: Arrays,
    direction: Any,
    directions: int | None,
    labels: Labels | None,
) -> GradDots:
    """One forward and backward pass with a channel behind every meeting.

    ``directions`` is K where the direction is stacked.
    """
    leading = () if directions is None else (directions,)
    positions = positions_of(labels)
    if positions is None:
        rows = (*leading, loss.num_rows)
        taps = [like_rows(wide_zeros(leaf, rows), arrays.batch) for leaf in arrays.params]
    else:
        taps = [wide_zeros(leaf, (*leading, positions.count)) for leaf in arrays.params]
    shared = [wide_zeros(leaf, leading) for leaf in arrays.params]
    stacked = directions is not None
    vectors = loss.push(arrays, jax.tree.leaves(direction), stacked)

    def objective(params, taps, shared):
        def walked(taps, batch):
            numbered = dict(enumerate(taps)), dict(enumerate(shared))
            walk = Directed(loss.names, loss.walked_rows, *numbered, stacked, vectors, positions)
            value, aux = loss.open(walk, params, batch, arrays.others)
            return [value.primal, *(leaf.primal for leaf in aux)], walk.conflicts

        if loss.per_example:  # JAX's batching rules track the rows
            walked = jax.vmap(walked, in_axes=(-1, 0))
        outputs, conflicts = walked(taps, arrays.batch)
        value, aux = loss.outputs_of(outputs)
        return value, (aux, counted(conflicts, labels))

    (value, (aux, conflicts)), (grads, dots, rest) = jax.value_and_grad(
        objective, argnums=(0, 1, 2), has_aux=True
    )(arrays.params, taps, shared)
    return finished(loss, value, aux, grads, dots, rest, labels, conflicts)


def finished(loss, value, aux, grads, dots, shared, labels, conflicts) -> GradDots:
    """The result, of leaves of the gradient and of sums by row or label."""
    dots, shared = by_row_label(dots, shared, labels)
    dots = or_nan([leaf * loss.scale for leaf in dots], conflicts)
    trees = (jax.tree.unflatten(loss.params, leaves) for leaves in (grads, dots, shared))
    return GradDots(value, aux, *trees, conflicts, loss.loss_reduction, loss.num_rows)


LABELS = {"labels": None, "num_labels": None}


def with_keywords(loss_fn: Callable[..., Any], own: dict[str, Any]) -> inspect.Signature:
    """The signature of ``loss_fn``, and keywords with their defaults."""
    kind = inspect.Parameter
    try:
        parameters = [*inspect.signature(loss_fn).parameters.values()]
    except (TypeError, ValueError):  # some callables have none
        parameters = [kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)]
    parameters = [found for found in parameters if found.name not in own]
    parameters += [kind(name, kind.KEYWORD_ONLY, default=value) for name, value in own.items()]
    return inspect.Signature(sorted(parameters, key=lambda found: found.kind))


def like_rows(tap, batch):
    """Explicit axes of a mesh, and manual ones, are part of a type: dots have that of the rows."""

    def by_row(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return jnp.sum(leaf, axis=range(1, leaf.ndim))

    kind = jax.eval_shape(by_row, batch[0])
    return jnp.broadcast_to(zeros_of(kind.update(dtype=tap.dtype)), tap.shape)


def wide_zeros(param: Any, shape: tuple[int, ...]) -> jax.Array:
    """Zeros in the dtype of a parameter's dots."""
    return jnp.zeros(shape, jnp.float64 if jnp.result_type(param) == jnp.float64 else jnp.float32)
