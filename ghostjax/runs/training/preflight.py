"""What can be known of a user's losses and optimizer before the first step."""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax._errors import BatchError, RowAxisError
from ghostjax._late import value_and_dots_fn
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.training.gradients import mean_and_losses
from ghostjax.runs.training.placement import ONE_DEVICE, Placement
from ghostjax.runs.training.step import TrainState


def check_train_losses(task: LoadedTask, params: Any, batch: Any) -> None:
    """Raises ``UsageError`` where the losses of training rows are not one per row."""
    _check_shape(task, params, batch.train_rows, "training rows")


def check_losses(
    task: LoadedTask,
    params: Any,
    batch: Any,
    placement: Placement = ONE_DEVICE,
) -> None:
    """Calls the losses at the initial parameters, on the first batch (``trainer.Batch``).

    Raises:
      UsageError: one line: they are not one per row, or not finite, or rows are mixed.
    """
    rows = batch.train_rows
    val_rows = placement.fetch(placement.val_rows(batch.val_rows))  # those of other processes, too
    sets = {
        name: jax.tree.map(lambda leaf, k=k: leaf[k].reshape(-1, *leaf.shape[3:]), val_rows)
        for k, name in enumerate(task.val_sizes)
    }
    for name, own in sets.items():
        _check_shape(task, params, own, f"rows of validation set {name}")
    row_losses = placement.losses(task.row_losses)
    loss_fn = value_and_dots_fn(mean_and_losses(row_losses), has_aux=True)

    @jax.jit
    def losses_and_conflicts(params, rows):
        (_, losses), _, dots = loss_fn(params, rows)
        return losses, dots.result(jax.tree.map(jnp.zeros_like, params)).conflicts

    try:
        losses, conflicts = placement.fetch(losses_and_conflicts(params, placement.rows(rows)))
    except (RowAxisError, BatchError) as error:
        raise UsageError(
            "row_losses mixes rows, so that no example has a loss of its own: "
            + " ".join(str(error).split())
            + " In a task, take jax.vmap of a loss of one row."
        ) from error
    if conflicts:
        raise UsageError(
            f"row_losses mixes rows, so that no example has a loss of its own: the data decide of "
            f"{int(conflicts)} places, as h + h[order] does; print(ghostjax.explain(row_losses)"
            "(params, batch)) says where parameters meet rows"
        )
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        ids = ", ".join(task.examples.id(batch.indices[n]) for n in bad[:4])
        more = f" and {bad.size - 4} more" if bad.size > 4 else ""
        raise UsageError(
            f"at the initial parameters, the loss of {ids}{more} is {losses[bad[0]]}: look at "
            "init, row_losses and these examples"
        )
    val_losses = jax.jit(row_losses)
    for name, own in sets.items():
        found = placement.fetch(val_losses(params, placement.rows(own)))
        if not np.isfinite(found).all():
            raise UsageError(
                f"at the initial parameters, a loss of validation set {name} is "
                f"{found[~np.isfinite(found)][0]}: look at init, row_losses and its examples"
            )


def _check_shape(task: LoadedTask, params: Any, rows: Any, what: str) -> None:
    count = len(jax.tree.leaves(rows)[0])
    found = jax.eval_shape(task.row_losses, params, rows)
    shape = getattr(found, "shape", None)
    if shape != (count,) or not jnp.issubdtype(found.dtype, jnp.floating):
        kind = "a tree" if shape is None else f"{found.dtype}{list(shape)}"
        raise UsageError(
            f"row_losses gave {kind} for {count} {what}: expected one loss per row, "
            f"float32[{count}]"
        )


def micro_step(opt_state: Any) -> int | None:
    """How many gradients ``optax.MultiSteps`` has gathered since it last updated; None without."""

    def gathers(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    leaves = jax.tree.leaves(opt_state, is_leaf=gathers)
    return next((int(leaf.mini_step) for leaf in leaves if gathers(leaf)), None)


def check_micro_steps(optimizer: Any, params: Any, score_every: int) -> None:
    """Raises ``UsageError`` where the first scored step gathers a gradient and does not update.

    Rows of such a step would score zero, whatever they do to later ones.
    """
    state = optimizer.init(params)
    if micro_step(state) is None:
        return

    @jax.jit
    def after(state, params):
        zeros = jax.tree.map(jnp.zeros_like, params)

        def update(_, state):
            return optimizer.update(zeros, state, params)[1]

        return jax.lax.fori_loop(0, score_every, update, state)

    if micro_step(after(state, params)):
        raise UsageError("task.optimizer: " + GATHERING.format(step=score_every - 1))


GATHERING = (
    "optax.MultiSteps only gathers the gradient of step {step}, so that its rows would score zero: "
    "take --score-every as its every_k_schedule, which scores the steps that update; or, to score "
    "every row, a --batch-size k times as large in --microbatches k, without MultiSteps"
)


def programs(task: LoadedTask, state: TrainState, rows: Any) -> dict[str, str]:
    """Digests of what the user's functions compute, by name, to tell whether they have changed.

    Numbers and arrays from outside the functions do not count, nor does the order of words, which
    for sets of names is another one in every process.
    """
    found = {"row_losses": jax.make_jaxpr(task.row_losses)(state.params, rows)}
    if task.optimizer is not None:
        arrays = state.params, state.opt_state, state.params
        found["optimizer"] = jax.make_jaxpr(task.optimizer.update)(*arrays)
    return {name: _digest(str(jaxpr)) for name, jaxpr in found.items()}


def _digest(text: str) -> str:
    words = re.findall(r"[\w.+-]+", re.sub(r"0x[0-9a-f]+", "", text))
    return hashlib.sha256(" ".join(sorted(words)).encode()).hexdigest()
