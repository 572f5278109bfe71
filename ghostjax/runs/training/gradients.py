"""Gradients of training rows, whole or in parts, and of validation rows through the optimizer."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghostjax import directions, fidelity
from ghostjax._aggregate import aggregate
from ghostjax._norms import squared_norms
from ghostjax._through import through_and_undefined
from ghostjax.runs.training.joined import Apart, Joined

PARTS = 2  # of a step's validation rows, for the sampling error of the scores
GROUPS = 2  # of a part's rows


def mean_and_losses(row_losses: Callable[[Any, Any], jax.Array]):
    """``(params, rows) -> mean of the losses, losses [B]``."""

    def loss_fn(params, rows):
        losses = row_losses(params, rows)
        return jnp.mean(losses), losses

    return loss_fn


def mean_of(row_losses: Callable[[Any, Any], jax.Array]):
    """``(params, rows) -> mean of the losses``."""
    return lambda params, rows: jnp.mean(row_losses(params, rows))


def in_parts(rows: Any, count: int) -> Any:
    """Rows [B, ...] as ``count`` parts of a batch, [count, B / count, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), rows)


def gradient_in_parts(
    row_losses: Callable[[Any, Any], jax.Array], params: Any, parts: Any
) -> tuple[jax.Array, Any]:
    """Losses [B] and the gradient of their mean, one part of the batch after another."""

    loss_fn = mean_and_losses(row_losses)

    def add(total, rows):
        (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
        return jax.tree.map(jnp.add, total, grads), losses

    total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return losses.reshape(-1), jax.tree.map(lambda leaf: leaf / len(losses), total)


def make_norms(row_losses: Callable[[Any, Any], jax.Array], microbatches: int):
    """``(params, rows) -> [B]``, the norms of the gradients of the rows' own losses, to be jitted.

    A forward and a backward pass of their own.
    """
    squared = squared_norms(row_losses)

    def norms(params, rows):
        parts = in_parts(rows, microbatches)
        squares = jax.lax.map(lambda part: aggregate(squared(params, part)), parts)
        return jnp.sqrt(jnp.maximum(squares.reshape(-1), 0))  # below zero by rounding

    return norms


@contextlib.contextmanager
def silent_micro_steps() -> Iterator[None]:
    """Without the warning of ``optax.MultiSteps``: a run refuses to score what gathers only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="optax.MultiSteps")
        yield


def in_groups(val_rows: Any) -> Any:
    """Validation rows [K, PARTS, n, ...] as groups of a set, [K, groups, rows of a group, ...].

    What an update does to the loss is measured for one group of each set.
    """

    def split(leaf):
        sets, parts, count, *shape = leaf.shape
        groups = parts * (GROUPS if count % GROUPS == 0 else 1)
        return leaf.reshape(sets, groups, -1, *shape)

    return jax.tree.map(split, val_rows)


class Directed(NamedTuple):
    """An update, and what its rows' gradients are multiplied with; K validation sets.

    Attributes:
      updates, opt_state: what the optimizer makes of the gradient.
      directions: trees like the parameters, [K * PARTS]: the gradients of the parts of the
        validation sets, through the optimizer.
      val_grads: these gradients themselves, [K * PARTS].
      val_loss: [K], where the gradients are taken.
      group: [K], the group of each set of which the update is predicted to change the loss most.
      predicted: [K], the decrease of that group's loss that is predicted.
      before: [K, rows of a group], that group's losses before the update, of order 1; else None, as
        they take a pass of their own.
      undefined: as ``directions.count_undefined``.
    """

    updates: Any
    opt_state: Any
    directions: Any
    val_grads: Any
    val_loss: jax.Array
    group: jax.Array
    predicted: jax.Array
    before: jax.Array | None
    undefined: jax.Array


def make_update(optimizer: optax.GradientTransformation, is_joined: bool = False):
    """``(params, opt_state, grads) -> joined updates``, to be jitted by itself.

    In one program with what it is used for, XLA would compute the learning rate again in every
    kernel that reads an update.
    """

    def update(params, opt_state, grads):
        arrays = Joined(params) if is_joined else Apart()
        return optimizer.update(*_joined(arrays, params, opt_state, grads))[0]

    return update


def _each(function: Callable[[Any], Any], rows: Any, at_once: int) -> Any:
    """``jax.lax.map``, ``at_once`` of them vectorized if JAX can."""
    if at_once > 1:
        with contextlib.suppress(NotImplementedError):  # some operations have no batching rule
            return jax.lax.map(function, rows, batch_size=at_once)
    return jax.lax.map(function, rows)


def _joined(arrays: Joined | Apart, params: Any, opt_state: Any, grads: Any) -> tuple[Any, ...]:
    """The arguments of ``optimizer.update``."""
    return arrays.join(grads), arrays.join_state(opt_state), arrays.join(params)


def make_directed(
    row_losses: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    order: int,
    is_joined: bool = False,
    is_saving: bool = False,
):
    """``(params, opt_state, grads, joined updates, val_rows) -> Directed``, to be jitted.

    Args:
      order: 1 for validation gradients at the parameters, 2 for the midpoint of the update.
      is_saving: whether to save memory: to differentiate one group of rows after another, not all
        of a set at once.
      is_joined: whether small arrays are one vector to the optimizer, which has to treat all
        coordinates alike.
    """
    loss_fn = mean_and_losses(row_losses)

    def directed(params, opt_state, grads, joined_updates, val_rows):
        arrays = Joined(params) if is_joined else Apart()
        updates = arrays.split(joined_updates)
        val_rows = in_groups(val_rows)
        sets, groups = jax.tree.leaves(val_rows)[0].shape[:2]

        def of_group(rows):
            if order == 1:
                found, losses = jax.grad(loss_fn, has_aux=True)(params, rows)
            else:
                found, losses = directions.midpoint(loss_fn, params, updates, rows, has_aux=True)
            return arrays.join(found), losses

        def of_parts(leaf):
            leaf = leaf.reshape(sets * PARTS, -1, *leaf.shape[1:])
            # XLA's reduction along so short an axis takes several times as long as a sum.
            return sum(leaf[:, n] for n in range(leaf.shape[1])) / leaf.shape[1]

        each = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), val_rows)
        by_group, losses = _each(of_group, each, 1 if is_saving else groups)
        predict = jax.vmap(fidelity.predicted_decrease, in_axes=(0, None))
        predicted = predict(by_group, joined_updates).reshape(sets, groups)
        losses = losses.reshape(sets, groups, -1)
        of_set, group = jnp.arange(sets), jnp.argmax(jnp.abs(predicted), axis=1)
        val_grads = jax.tree.map(of_parts, by_group)
        own_grads, *own = _joined(arrays, params, opt_state, grads)
        with silent_micro_steps():
            _, new_opt_state = optimizer.update(own_grads, *own)
            through, undefined = through_and_undefined(optimizer, *own, own_grads)
        return Directed(
            updates,
            arrays.split_state(new_opt_state, opt_state),
            jax.vmap(arrays.split)(arrays.each(through, val_grads)),
            jax.vmap(arrays.split)(val_grads),
            losses.mean((1, 2)),
            group,
            predicted[of_set, group],
            losses[of_set, group] if order == 1 else None,
            undefined,
        )

    return directed
