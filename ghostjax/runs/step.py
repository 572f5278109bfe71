"""The jitted training step: one update, the scores of its rows, and how good they are."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax import directions, fidelity
from ghostjax._dots import GradDots, conservation_error
from ghostjax._early import value_grad_and_dots
from ghostjax._late import value_and_dots_fn

PARTS = 2  # of a step's validation rows, for the sampling error of the scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one step hands to the next, as in any optax loop."""

    params: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a step found out. K validation sets, G kinds of layers; losses before the update.

    Attributes:
      loss: mean loss of the rows;  row_losses: [B].
      scores: [K, B], the predicted decrease of each validation loss by row i's share of the
        update;  errors: [K, B], their standard errors.
      kinds: [K, G], what each kind of layer has in the summed size of the scores: over the rows,
        the sum of its part of the score times the score's sign.
      val_loss, predicted, actual: [K]; the decrease of val_loss by the whole update.
      correlation: [K], of the scores with plain inner products of gradients.
      conservation_error, audit_error: scalars; audit_error is NaN without an audit.
      undefined: int32, coordinates of the update without a finite derivative.
    """

    loss: Any
    row_losses: Any
    scores: Any
    errors: Any
    kinds: Any
    val_loss: Any
    predicted: Any
    actual: Any
    correlation: Any
    conservation_error: Any
    audit_error: Any
    undefined: Any


def make_step(
    row_losses: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    kinds: Sequence[int],
    *,
    order: int = 1,
    microbatches: int = 1,
    remat: bool = False,
):
    """The jitted step ``(state, train_rows, val_rows, audited) -> (state, StepRecord)``.

    The update is that of plain training on ``mean(row_losses(params, train_rows))``; the buffers of
    the old state are reused.

    Args:
      kinds: for every leaf of the parameters, the number of its kind.
      order: 1, or 2 for validation gradients half-way along the update.
      microbatches: how many parts of the batch are differentiated one after another.
      remat: whether to save memory rather than time.

    One forward and one backward pass over the training rows give the gradient, and the factors that
    the scores are made of when it is known. With ``remat`` or several parts a second pass is made
    instead: factors kept of all layers and rows would need the memory that is to be saved.

    ``train_rows`` are [B, ...], ``val_rows`` [K, PARTS, V / PARTS, ...]; ``audited`` are the rows
    to be redone by plain autodiff, [n], or all -1 for none.
    """

    def loss_fn(params, rows):
        losses = row_losses(params, rows)
        return jnp.mean(losses), losses

    def mean_loss(params, rows):
        return loss_fn(params, rows)[0]

    def differentiate(params, rows):
        """(loss, row losses), gradient, and what gives ``GradDots`` for stacked directions."""
        if microbatches == 1:
            fn = value_and_dots_fn(loss_fn, has_aux=True, remat=remat)
            outputs, grads, dots = fn(params, rows)
            return outputs, grads, dots.result
        parts = in_parts(rows, microbatches)
        losses, grads = gradient_in_parts(row_losses, params, parts)
        loss = jnp.mean(losses)

        def result(direction):
            def one(rows):
                found = value_grad_and_dots(mean_loss)(params, rows, direction=direction)
                return found.dots, found.shared, found.conflicts

            dots, shared, conflicts = jax.lax.map(one, parts)
            dots = jax.tree.map(
                lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(leaf.shape[1], -1), dots
            )
            shared = jax.tree.map(lambda leaf: leaf.mean(0), shared)
            return GradDots(loss, losses, grads, dots, shared, conflicts.sum(), "mean", len(losses))

        return (loss, losses), grads, result

    def step(state, train_rows, val_rows, audited):
        params, opt_state = state.params, state.opt_state
        sets = jax.tree.leaves(val_rows)[0].shape[0]
        flat_rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), val_rows)
        (loss, losses), grads, dots = differentiate(params, train_rows)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        val_losses, plain_grads, part_grads = validate(mean_loss, params, updates, flat_rows, order)
        plain_grads, val_grads = jax.tree.map(
            lambda leaf: leaf.reshape(sets, PARTS, *leaf.shape[1:]).mean(1),
            (plain_grads, part_grads),
        )
        by_part = directions.through_optimizer(optimizer, opt_state, params, grads, part_grads)
        # The plain gradients are there for comparison alone.
        direction = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), by_part, plain_grads)
        result = dots(direction)

        new_params = optax.apply_updates(params, updates)
        new_losses = jax.lax.map(lambda rows: mean_loss(new_params, rows), flat_rows)

        rows = losses.shape[0]
        scores = result.total() / rows
        parts, plain = jnp.split(scores, [sets * PARTS])
        parts = parts.reshape(sets, PARTS, rows)
        own = parts.mean(1)

        first = jax.tree.map(lambda leaf: leaf[0], (result.dots, result.shared, direction))
        one_direction = dataclasses.replace(result, dots=first[0], shared=first[1])
        conservation = conservation_error(one_direction, first[2])
        audit_error = jax.lax.cond(
            audited[0] >= 0,
            lambda: fidelity.audit(
                mean_loss,
                params,
                train_rows,
                direction=first[2],
                dots=one_direction.total(),
                rows=audited,
                shared=one_direction.shared,
                row_weights=jnp.ones(rows),
            ),
            lambda: jnp.float32(jnp.nan),
        )
        record = StepRecord(
            loss=loss,
            row_losses=losses,
            scores=own,
            errors=jax.vmap(fidelity.standard_error)(parts),
            kinds=_by_kind(result.dots, kinds, own),
            val_loss=val_losses.reshape(sets, PARTS).mean(1),
            predicted=jax.vmap(fidelity.predicted_decrease, in_axes=(0, None))(val_grads, updates),
            actual=(val_losses - new_losses).reshape(sets, PARTS).mean(1),
            correlation=fidelity.correlation(own, plain),
            conservation_error=jnp.max(jnp.stack(jax.tree.leaves(conservation))),
            audit_error=audit_error,
            undefined=directions.count_undefined(optimizer, opt_state, params, grads),
        )
        return TrainState(new_params, new_opt_state), record

    return jax.jit(step, donate_argnums=0)


def in_parts(rows: Any, count: int) -> Any:
    """Rows [B, ...] as ``count`` parts of a batch, [count, B / count, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), rows)


def gradient_in_parts(
    row_losses: Callable[[Any, Any], jax.Array], params: Any, parts: Any
) -> tuple[jax.Array, Any]:
    """Losses [B] and the gradient of their mean, one part of the batch after another."""

    def loss_fn(params, rows):
        losses = row_losses(params, rows)
        return jnp.mean(losses), losses

    def add(total, rows):
        (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
        return jax.tree.map(jnp.add, total, grads), losses

    total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return losses.reshape(-1), jax.tree.map(lambda leaf: leaf / len(losses), total)


def validate(
    mean_loss: Callable[[Any, Any], jax.Array], params: Any, updates: Any, rows: Any, order: int
) -> tuple[jax.Array, Any, Any]:
    """The validation losses of parts of the rows, and their gradients.

    Args:
      rows: [K * PARTS, V / PARTS, ...].
      order: 1, or 2 for gradients half-way along ``updates``.

    Returns:
      Losses [K * PARTS]; and stacked alike the plain gradients, and those of the order asked for.
    """

    def one(rows):
        loss, plain = jax.value_and_grad(mean_loss)(params, rows)
        grads = [plain]
        if order == 2:
            grads.append(directions.midpoint(mean_loss, params, updates, rows))
        return loss, grads

    losses, grads = jax.lax.map(one, rows)
    return losses, grads[0], grads[-1]


def _by_kind(dots: Any, kinds: Sequence[int], scores: jax.Array) -> jax.Array:
    """[K, G]: what each kind of layer has in the size of the rows' scores [K, B]."""
    sets, rows = scores.shape
    leaves = jnp.stack([leaf[: sets * PARTS] for leaf in jax.tree.leaves(dots)]) / rows
    groups = np.zeros((max(kinds) + 1, len(kinds)), np.float32)
    groups[list(kinds), range(len(kinds))] = 1
    by_kind = jnp.einsum("gp,pkb->gkb", groups, leaves).reshape(-1, sets, PARTS, rows).mean(2)
    return jnp.einsum("gkb,kb->kg", by_kind, jnp.sign(scores))
