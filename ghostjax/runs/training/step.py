"""One update, the scores of its rows, and how good they are.

A step is a handful of jitted functions, called one after another: they compile faster than they
would as one, validation losses before and after the update are one of them called twice, and the
audit is compiled only where one is due.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax import fidelity
from ghostjax._dots import GradDots, conservation_error
from ghostjax._early import value_grad_and_dots
from ghostjax._late import value_and_dots_fn
from ghostjax.runs.training.gradients import (
    PARTS,
    gradient_in_parts,
    in_groups,
    in_parts,
    make_directed,
    make_update,
    mean_and_losses,
    mean_of,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one step hands to the next, as in any optax loop."""

    params: Any
    opt_state: Any


AUDITED_ONLY = ("audit_error", "correlation")  # NaN at the other steps


class StepRecord(NamedTuple):
    """What a step adds to the tables of the log: their columns by name, as ``schema`` describes
    them; K validation sets, G kinds of layers.

    Attributes:
      scores: arrays over the rows, [B], or [K, B] where a column is there per validation set.
      steps: scalars, or [K]; ``AUDITED_ONLY`` are NaN without an audit.
      kinds: the score of each kind of layer, [K, G].
    """

    scores: dict[str, Any]
    steps: dict[str, Any]
    kinds: Any


def make_step(
    row_losses: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    kinds: Sequence[int],
    *,
    order: int,
    microbatches: int = 1,
    remat: bool = False,
    is_joined: bool = False,
):
    """The step ``(state, train_rows, val_rows, audited=None) -> (state, StepRecord)``.

    The update is that of plain training on ``mean(row_losses(params, train_rows))``; the buffers of
    the old state are reused.

    Args:
      kinds: for every leaf of the parameters, the number of its kind.
      order: 1 for validation gradients at the parameters, 2 for the midpoint of the update.
      microbatches: how many parts of the batch are differentiated one after another.
      remat: whether to save memory rather than time.
      is_joined: as ``make_directed`` has it.

    One forward and one backward pass over the training rows give the gradient, and the factors that
    the scores are made of when it is known. With ``remat`` or several parts a second pass is made
    instead: factors kept of all layers and rows would need the memory that is to be saved.

    What the update did to the validation loss is measured at every step, for the group of each
    validation set (``in_groups``) of which most is predicted: a row that predicts far too much is
    there, and all rows would cost four times as much. Plain inner products, for ``correlation``,
    take directions of their own, so they are there at audits alone.

    ``train_rows`` are [B, ...], ``val_rows`` [K, PARTS, V / PARTS, ...]; ``audited`` are the rows
    to be redone by plain autodiff, [n], for all validation sets.
    """
    differentiate = jax.jit(_differentiate(row_losses, microbatches, remat))
    update = jax.jit(make_update(optimizer, is_joined))
    is_saving = remat or microbatches > 1
    directed = make_directed(row_losses, optimizer, order, is_joined, is_saving)
    directed = jax.jit(directed, donate_argnums=1)
    score = jax.jit(_make_score(row_losses, kinds, microbatches))
    audit = jax.jit(_make_audit(row_losses))
    correlation = jax.jit(fidelity.correlation)
    apply = jax.jit(optax.apply_updates, donate_argnums=0)

    @jax.jit
    def group_losses(params, val_rows, group):
        sets = len(group)
        rows = jax.tree.map(lambda leaf: leaf[jnp.arange(sets), group], in_groups(val_rows))
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
        return row_losses(params, rows).reshape(sets, -1)

    @jax.jit
    def decrease(before, after):
        return (before - after).mean(1)

    def step(state, train_rows, val_rows, audited=None):
        params = state.params
        losses, grads, late = differentiate(params, train_rows)
        updates = update(params, state.opt_state, grads)
        found = directed(params, state.opt_state, grads, updates, val_rows)
        if audited is None:
            found = found._replace(val_grads=None)  # gives their memory back
        before = found.before
        if before is None:
            before = group_losses(params, val_rows, found.group)
        record, dots = score(params, train_rows, losses, grads, late, found.directions)
        audited_only = dict.fromkeys(AUDITED_ONLY, np.full(len(before), np.nan, np.float32))
        if audited is not None:
            plain, _ = score(params, train_rows, losses, grads, late, found.val_grads)
            scores = record.scores["score"], plain.scores["score"]
            audited_only = {
                "audit_error": audit(params, train_rows, audited, found.directions, *dots),
                "correlation": correlation(*scores),
            }
        del late  # it refers to the parameters, whose buffers are given up
        params = apply(params, found.updates)
        measured = {
            "val_loss": found.val_loss,
            "predicted": found.predicted,
            "actual": decrease(before, group_losses(params, val_rows, found.group)),
            "undefined": found.undefined,
        }
        record = record._replace(steps=record.steps | measured | audited_only)
        return TrainState(params, found.opt_state), record

    return step


def make_plain_step(
    row_losses: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
):
    """The jitted step without scores, ``(state, train_rows) -> (state, row losses [B])``."""

    def step(state, train_rows):
        losses, grads = gradient_in_parts(
            row_losses, state.params, in_parts(train_rows, microbatches)
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), losses

    return jax.jit(step, donate_argnums=0)


def _differentiate(row_losses, microbatches: int, remat: bool):
    """``(params, rows) -> row losses, gradient``, and ``LateDots`` or None."""

    def whole(params, rows):
        fn = value_and_dots_fn(mean_and_losses(row_losses), has_aux=True, remat=remat)
        (_, losses), grads, dots = fn(params, rows)
        return losses, grads, dots

    def parted(params, rows):
        return *gradient_in_parts(row_losses, params, in_parts(rows, microbatches)), None

    return whole if microbatches == 1 else parted


def _make_score(row_losses, kinds: Sequence[int], microbatches: int):
    """``(params, rows, losses, grads, late, directions)`` to a ``StepRecord`` of all that needs the
    dots with [K * PARTS] directions, and for an audit the dots [K * PARTS, B] and their parts of no
    row [K * PARTS].
    """

    def dots(params, rows, losses, grads, late, direction):
        if late is not None:
            return late.result(direction)

        def one(rows):
            found = value_grad_and_dots(mean_of(row_losses))(params, rows, direction=direction)
            return found.dots, found.shared, found.conflicts

        dots, shared, conflicts = jax.lax.map(one, in_parts(rows, microbatches))
        dots = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(leaf.shape[1], -1), dots)
        shared = jax.tree.map(lambda leaf: leaf.mean(0), shared)
        loss = jnp.mean(losses)
        return GradDots(loss, losses, grads, dots, shared, conflicts.sum(), "mean", len(losses))

    def score(params, train_rows, losses, grads, late, direction):
        result = dots(params, train_rows, losses, grads, late, direction)
        rows = losses.shape[0]
        total = result.total()
        parts = total.reshape(-1, PARTS, rows) / rows
        errors = jnp.stack(jax.tree.leaves(conservation_error(result, direction)))
        record = StepRecord(
            scores={
                "loss": losses,
                "score": parts.mean(1),
                "error": jax.vmap(fidelity.standard_error)(parts),
            },
            steps={
                "loss": jnp.mean(losses),
                "conservation_error": errors.max(0).reshape(-1, PARTS).max(1),
            },
            kinds=_by_kind(result.dots, kinds, parts.mean(1)),
        )
        return record, (total, sum(jax.tree.leaves(result.shared)))

    return score


def _make_audit(row_losses):
    """``(params, rows, audited, directions, dots, shared) -> [K]``, the largest error of a part."""

    def audit(params, train_rows, audited, direction, dots, shared):
        def of_part(direction, dots, shared):
            return fidelity.audit(
                mean_of(row_losses),
                params,
                train_rows,
                direction=direction,
                dots=dots,
                rows=audited,
                shared=shared,
                row_weights=jnp.ones(dots.shape),
            )

        return jax.vmap(of_part)(direction, dots, shared).reshape(-1, PARTS).max(1)

    return audit


def _by_kind(dots: Any, kinds: Sequence[int], scores: jax.Array) -> jax.Array:
    """[K, G]: what each kind of layer has in the size of the rows' scores [K, B]."""
    sets, rows = scores.shape
    leaves = jnp.stack(jax.tree.leaves(dots)) / rows
    groups = np.zeros((max(kinds) + 1, len(kinds)), np.float32)
    groups[list(kinds), range(len(kinds))] = 1
    by_kind = jnp.einsum("gp,pkb->gkb", groups, leaves).reshape(-1, sets, PARTS, rows).mean(2)
    return jnp.einsum("gkb,kb->kg", by_kind, jnp.sign(scores))
