"""value_grad_and_dots: the direction form, for any JAX function."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._aggregate import aggregate
from ghostjax._checks import batch_rows, check_argnums, check_direction, check_parameters
from ghostjax._walk import Rows, Value, Walk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradDots:
    """What ``value_grad_and_dots`` returns.

    Attributes:
      value: scalar, the loss.
      aux: what the loss function returned beside it, or None.
      grads: what ``jax.grad`` returns.
      dots: tree of the parameters, every leaf [B] in float32 (float64 for float64 parameters).
      shared: tree of scalars: the part of <grads, direction> that belongs to no row, such as weight
        decay inside the loss.
      loss_reduction: "mean" or "sum", static: the scale of the dots.
    """

    value: jax.Array
    aux: Any
    grads: Any
    dots: Any
    shared: Any
    loss_reduction: str = dataclasses.field(metadata={"static": True})

    def total(self) -> jax.Array:
        """The dots summed over all parameters, [B]."""
        return aggregate(self.dots)


def conservation_error(result: GradDots, direction: Any) -> Any:
    """The certificate: how far the dots are from adding up to what autodiff says, per parameter.

    With s = 1/B for loss_reduction "mean" and 1 for "sum", ``s * sum_i dots[i] + shared`` must be
    ``<grads, direction>``, and ``grads`` is computed without any of the dots' machinery.

    Returns:
      A tree of the parameters of float32 scalars: the difference, relative to
      ``s * sum_i |dots[i]| + |shared|`` or, where larger, to ``|<grads, direction>|``; but at least
      to a thousandth of the largest of these in the tree, as a gradient that is zero but for
      rounding has no meaningful relative error. A use of a parameter that was missed shows as an
      error of order one, by name.
    """

    return _conservation_error(
        result.grads, direction, result.dots, result.shared, result.loss_reduction
    )


@functools.partial(jax.jit, static_argnums=4)
def _conservation_error(grads: Any, direction: Any, dots: Any, shared: Any, reduction: str) -> Any:
    def parts(grad, vector, dots, shared):
        wide = dots.dtype
        scale = 1 / dots.shape[0] if reduction == "mean" else 1.0
        found = scale * jnp.sum(dots) + shared
        expected = jnp.sum(grad.astype(wide) * vector.astype(wide))
        size = jnp.maximum(scale * jnp.sum(jnp.abs(dots)) + jnp.abs(shared), jnp.abs(expected))
        return jnp.abs(found - expected), size

    leaves, treedef = jax.tree.flatten(grads)
    others = (treedef.flatten_up_to(tree) for tree in (direction, dots, shared))
    differences, sizes = zip(*map(parts, leaves, *others))
    floor = jnp.maximum(1e-3 * jnp.max(jnp.stack(sizes)), jnp.finfo(jnp.float32).tiny)
    errors = [difference / jnp.maximum(size, floor) for difference, size in zip(differences, sizes)]
    return jax.tree.unflatten(treedef, errors)


@jax.custom_vjp
def _not_differentiable(dots: Any) -> Any:
    return dots


def _refuse(dots):
    raise NotImplementedError(
        "the result of value_grad_and_dots cannot be differentiated again: its dots are made in a "
        "backward pass that keeps nothing for another. Differentiate <jax.grad(loss), direction> "
        "of the rows in question instead."
    )


_not_differentiable.defvjp(_refuse, lambda _, cotangents: (cotangents,))


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

        dots[p][i] = < d l_i / d p , direction[p] >

    for any JAX function, out of the backward pass that gives the gradient.

    Args:
      loss_fn: ``loss_fn(params, batch, ...) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        With ``per_example``, the loss of one row: the batch arguments come without their leading
        axis, and the returned value is the mean (or sum) over rows, aux stacked over rows.
      argnums: which positional arguments are the parameters: trees of floating-point arrays.
      batch_argnums: which are the batch: trees of arrays that share their leading size B.
      loss_reduction: "mean": the loss is a mean over rows and dots[i] refers to row i's own loss,
        B times its share; "sum": dots[i] is row i's share of <grads, direction>. A row's share is
        the derivative of the loss as that row alone sees the parameters move along the direction,
        which is defined for losses that are no sum over rows, too (their maximum, say).

    Returns:
      ``fn(*args, direction, **kwargs) -> GradDots``, with ``direction`` a tree like the parameters
      (a tuple of trees for several argnums), same shapes and dtypes. It is a pure function for use
      under ``jax.jit``.

    Guarantees: value, aux and grads are computed by the operations of ``jax.value_and_grad``. Where
    parameters are used is found in the jaxpr, whatever library made it; which axis holds rows is
    tracked through every operation. What cannot be followed is an error, never a skip.

    Raises:
      RowAxisError: rows are mixed, or lost where a parameter is used; names the operation.
      ValueError, TypeError: the batch or the direction does not fit.
      NotImplementedError: a parameter goes into an operation that cannot be walked, or the result
        is differentiated.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.square(x @ w) / 2)
    >>> fn = value_grad_and_dots(loss_fn)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> result = fn(w, x, direction=jnp.array([1.0, 0.5]))
    >>> result.value, result.grads, result.dots
    (Array(2.5, dtype=float32), Array([2., 3.], dtype=float32), Array([1., 6.], dtype=float32))

    Source: Data Shapley in One Training Run, arXiv:2406.11011, for what the dots are good for.
    """
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}.')

    @functools.wraps(loss_fn)
    def fn(*args: Any, direction: Any, **kwargs: Any) -> GradDots:
        numbers, batch_numbers = check_argnums(argnums, batch_argnums, len(args))
        params = tuple(args[number] for number in numbers)
        batch = tuple(args[number] for number in batch_numbers)
        named = params[0] if isinstance(argnums, int) else params
        check_parameters(named)
        check_direction(named, direction)
        if isinstance(argnums, int):
            direction = (direction,)
        num_rows = batch_rows(batch[0] if isinstance(batch_argnums, int) else batch)

        def call(params, batch, *others):
            """``loss_fn`` with the arguments put back in their places: (scalar, aux)."""
            full = dict(zip(numbers, params)) | dict(zip(batch_numbers, batch))
            rest, kwargs = others
            full |= rest
            output = loss_fn(*(full[number] for number in range(len(args))), **kwargs)
            if has_aux and not (isinstance(output, (tuple, list)) and len(output) == 2):
                raise TypeError(
                    "with has_aux, loss_fn must return a pair (loss, aux). Found "
                    f"{jax.tree.structure(output)}."
                )
            return output if has_aux else (output, None)

        rest = {
            number: arg
            for number, arg in enumerate(args)
            if number not in numbers and number not in batch_numbers
        }
        evaluate = _one_row if per_example else _whole_batch
        paths = [
            jax.tree_util.keystr(path) or "params"
            for path, _ in jax.tree_util.tree_leaves_with_path(named)
        ]
        taps, shared = _zeros(paths, params, (num_rows,)), _zeros(paths, params, ())
        taps = jax.tree.map(lambda tap: _sharded_like_rows(tap, batch), taps)

        def objective(params, taps, shared):
            losses, aux = evaluate(
                call, paths, params, batch, (rest, kwargs), direction, taps, shared, num_rows
            )
            if per_example:
                losses = jnp.mean(losses) if loss_reduction == "mean" else jnp.sum(losses)
            return losses, aux

        (value, aux), (grads, dots, rest_dots) = jax.value_and_grad(
            objective, argnums=(0, 1, 2), has_aux=True
        )(params, taps, shared)
        scale = num_rows if loss_reduction == "mean" else 1
        treedef = jax.tree.structure(params)
        dots = jax.tree.unflatten(treedef, [dots[path] * scale for path in paths])
        rest_dots = jax.tree.unflatten(treedef, [rest_dots[path] for path in paths])
        if isinstance(argnums, int):
            (grads,), (dots,), (rest_dots,) = grads, dots, rest_dots
        dots, rest_dots = _not_differentiable((dots, rest_dots))
        return GradDots(value, aux, grads, dots, rest_dots, loss_reduction)

    fn.__signature__ = _with_direction(loss_fn)  # jax.jit looks for donated names there
    return fn


def _with_direction(loss_fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``fn``."""
    kind = inspect.Parameter
    try:
        parameters = [*inspect.signature(loss_fn).parameters.values()]
    except (TypeError, ValueError):  # some callables have none
        parameters = [kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)]
    parameters = [found for found in parameters if found.name != "direction"]
    parameters.append(kind("direction", kind.KEYWORD_ONLY))
    return inspect.Signature(sorted(parameters, key=lambda found: found.kind))


def _sharded_like_rows(tap, batch):
    """Rows of the batch may be sharded over explicit axes of a mesh, and then dots are, too."""
    sharding = jax.typeof(jax.tree.leaves(batch)[0]).sharding
    axes = sharding.spec[:1]
    if not axes or axes[0] is None:
        return tap
    return jax.sharding.reshard(tap, sharding.update(spec=jax.sharding.PartitionSpec(*axes)))


def _zeros(paths, params, shape):
    return {
        path: jnp.zeros(shape, jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32)
        for path, leaf in zip(paths, jax.tree.leaves(params))
    }


_ARRAYS = (jax.Array, np.ndarray, np.generic)  # settings of a model may have a dtype, too


def _trace(call, params, batch, others):
    """The jaxpr of a call, with every array of ``others`` an input and the rest static."""
    leaves, treedef = jax.tree.flatten(others)
    arrays = [leaf for leaf in leaves if isinstance(leaf, _ARRAYS)]

    def run(params, batch, arrays):
        remaining = iter(arrays)
        full = [next(remaining) if isinstance(leaf, _ARRAYS) else leaf for leaf in leaves]
        return call(params, batch, *jax.tree.unflatten(treedef, full))

    closed, shapes = jax.make_jaxpr(run, return_shape=True)(params, batch, arrays)
    loss = shapes[0]
    if not hasattr(loss, "shape") or loss.shape != ():
        raise ValueError(
            "loss_fn must return a scalar loss (with per_example, the scalar loss of one row; with "
            "has_aux, a pair of it and aux). "
            f"Found {jax.tree.map(lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', loss)}."
        )
    return closed, arrays, jax.tree.structure(shapes)


def _walk(closed, paths, params, batch, arrays, direction, taps, shared, num_rows):
    rows = None if num_rows is None else Rows(0)
    operands = [
        Value(leaf, {path: jax.lax.stop_gradient(vector)})
        for leaf, path, vector in zip(
            jax.tree.leaves(params), paths, jax.tree.leaves(direction), strict=True
        )
    ]
    operands += [Value(leaf, {}, True, False, rows) for leaf in jax.tree.leaves(batch)]
    operands += [Value(leaf) for leaf in arrays]
    walk = Walk(taps, shared, num_rows)
    loss, *aux = walk.run(closed, operands)
    if loss.tangents:
        loss = walk.promote(loss, None)
    return [loss.primal, *(value.primal for value in aux)]


def _whole_batch(call, paths, params, batch, others, direction, taps, shared, num_rows):
    closed, arrays, treedef = _trace(call, params, batch, others)
    outputs = _walk(closed, paths, params, batch, arrays, direction, taps, shared, num_rows)
    return jax.tree.unflatten(treedef, outputs)


def _one_row(call, paths, params, batch, others, direction, taps, shared, num_rows):
    """The walk of one row's loss, vectorized: JAX's batching rules track the rows."""
    del shared, num_rows
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    closed, arrays, treedef = _trace(call, params, row, others)

    def run(taps, row):
        outputs = _walk(closed, paths, params, row, arrays, direction, taps, {}, None)
        return jax.tree.unflatten(treedef, outputs)

    return jax.vmap(run)(taps, batch)
