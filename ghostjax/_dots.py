"""The result of a pass with a direction at hand, its certificate, and that pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._aggregate import aggregate
from ghostjax._dtypes import wide_dtype
from ghostjax._labels import by_row_label, counted, or_nan, positions_of
from ghostjax._loss import Arrays, Loss
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
      squared_norms: a tree of the parameters, every leaf [B] (with labels [S]): of the rows'
        gradients, as ``squared_norms`` gives them; None if they were not asked for.
    """

    value: jax.Array
    aux: Any
    grads: Any
    dots: Any
    shared: Any
    conflicts: jax.Array
    loss_reduction: str = dataclasses.field(metadata={"static": True})
    num_rows: int = dataclasses.field(metadata={"static": True})
    squared_norms: Any = None

    def cosine(self, direction: Any) -> jax.Array:
        """The cosine of every row's gradient with the direction over all parameters, [B] or [K, B];
        0 where one of them is zero. Needs ``norms=True``."""
        if self.squared_norms is None:
            raise ValueError("cosine needs squared norms: call value_grad_and_dots with norms=True")
        stacked = _is_stacked(self.dots)

        def squares(leaf, dots):
            axes = range(stacked, leaf.ndim)
            return jnp.sum(jnp.square(leaf.astype(dots.dtype)), axis=axes, keepdims=False)

        own = sum(jax.tree.leaves(jax.tree.map(squares, direction, self.dots)))
        rows = aggregate(self.squared_norms)
        size = jnp.sqrt(own[:, None] * rows[None] if stacked else own * rows)
        return jnp.where(size > 0, self.total() / jnp.where(size > 0, size, 1), 0)

    def total(self) -> jax.Array:
        """The dots summed over all parameters, [B]; of K stacked directions [K, B]."""
        return (jax.vmap(aggregate) if _is_stacked(self.dots) else aggregate)(self.dots)


def conservation_error(result: GradDots, direction: Any) -> Any:
    """The certificate: how far the dots are from adding up to what autodiff says, per parameter.

    With s = 1/B for loss_reduction "mean" and 1 for "sum", ``s * sum_i dots[i] + shared`` must be
    ``<grads, direction>``, and ``grads`` is computed without any of the dots' machinery but on the
    rows route (see ``explain``), where both come out of one loop.

    Args:
      result: of ``value_grad_and_dots``, or of ``LateDots.result``.
      direction: that of the result; with a leading axis K on every leaf where it was so there.

    Returns:
      A tree of the parameters of float32 scalars (of K stacked directions [K]): the difference,
      relative to ``s * sum_i |dots[i]| + |shared|`` or, where larger, to ``|<grads, direction>|``;
      but at least to a thousandth of the largest of these in the tree, as a gradient that is zero
      but for rounding has no meaningful relative error. A use of a parameter that was missed shows
      as an error of order one, by name.

    Raises:
      ValueError: the direction's tree is not that of the parameters.

    >>> import jax.numpy as jnp
    >>> from ghostjax import value_grad_and_dots
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

    def make(others, vectors, *args):
        del others
        return Directed(*args, vectors, positions_of(labels))

    return directed_with(make, (), loss, arrays, direction, directions, labels)[0]


def directed_with(make, others, loss, arrays, direction, directions, labels):
    """The same with another walk, ``make(others, vectors, ...)``.

    Returns:
      The result; what the walk emitted; and the gradient with respect to ``others``, a tree of
      arrays, with the rows in front where the jaxpr is that of one row.
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

    def objective(params, taps, shared, others):
        def walked(taps, batch, others):
            numbered = dict(enumerate(taps)), dict(enumerate(shared))
            walk = make(others, vectors, loss.names, loss.walked_rows, *numbered, stacked)
            value, aux = loss.open(walk, params, batch, arrays.others)
            outputs = [value.primal, *(leaf.primal for leaf in aux)]
            return outputs, walk.emitted, walk.conflicts

        if loss.per_example:  # JAX's batching rules track the rows
            walked = jax.vmap(walked, in_axes=(-1, 0, 0))
        outputs, emitted, conflicts = walked(taps, arrays.batch, others)
        value, aux = loss.outputs_of(outputs)
        return value, (aux, emitted, counted(conflicts, labels))

    (value, (aux, emitted, conflicts)), (grads, dots, rest, given) = jax.value_and_grad(
        objective, argnums=(0, 1, 2, 3), has_aux=True
    )(arrays.params, taps, shared, others)
    found = finished(loss, value, aux, grads, dots, rest, labels, conflicts)
    return found, emitted, given


def finished(loss, value, aux, grads, dots, shared, labels, conflicts) -> GradDots:
    """The result, of leaves of the gradient and of sums by row or label."""
    dots, shared = by_row_label(dots, shared, labels)
    dots = or_nan([leaf * loss.scale for leaf in dots], conflicts)
    trees = (jax.tree.unflatten(loss.params, leaves) for leaves in (grads, dots, shared))
    return GradDots(value, aux, *trees, conflicts, loss.loss_reduction, loss.num_rows)


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
    return jnp.zeros(shape, wide_dtype(param))
