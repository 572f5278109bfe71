"""Scores of single positions: which tokens of a window a row's score is made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax import fidelity
from ghostjax._early import value_grad_and_dots
from ghostjax.runs.analysis.judgement import TOLERANCES
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.errors import StoppedError
from ghostjax.runs.training.gradients import (
    PARTS,
    gradient_in_parts,
    in_parts,
    make_directed,
    make_update,
    mean_and_losses,
)
from ghostjax.runs.training.step import TrainState
from ghostjax.runs.training.trainer import batches


class Windows(NamedTuple):
    """Scores of R windows of T positions for K validation sets.

    Attributes:
      indices, starts: [R], which example, and the window's first token in it.
      counts: [R], how many of the T positions have a token that is followed by another one.
      losses: [R], the windows' own losses.
      totals, total_errors: [K, R], the scores of the windows as rows, and their standard errors.
      scores, errors: [K, R, T], those of their positions; zero where the text has ended.
    """

    indices: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    losses: np.ndarray
    totals: np.ndarray
    total_errors: np.ndarray
    scores: np.ndarray
    errors: np.ndarray


def score_windows(
    config: TrainConfig,
    task: TextTask,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    step: int,
    indices: Sequence[int],
    starts: Sequence[int],
) -> Windows:
    """Scores of windows and their positions, in the step that follows ``state``.

    The score of a window is what the log of the run would have for it, were it a row of that step,
    and has for those that were: the predicted decrease of the validation loss by its share of the
    update, with the step's own batch, validation rows and derivative of the update. A position has
    of it what the uses of the parameters at that position contribute.

    Args:
      state: the state before the step of number ``step``.

    Raises:
      StoppedError: a score is not finite, or those of a window's positions do not add up to the
        score of the window, which is computed without them.
    """
    indices, starts = np.asarray(indices), np.asarray(starts)
    batch = next(batches(config, task, step))
    find = make_directions(task.row_losses, optimizer, config.order, config.microbatches)
    direction = find(state, batch.train_rows, batch.val_rows)
    score = make_scores(task.row_losses, config.batch_size)

    # All calls have one shape, so that one is compiled: the last window is there several times.
    size = min(config.batch_size // config.microbatches, len(indices))
    places = np.minimum(np.arange(-(-len(indices) // size) * size), len(indices) - 1)
    found, masks = [], []
    for chosen in places.reshape(-1, size):
        rows = task.window_rows(indices[chosen], starts[chosen])
        found.append(jax.tree.map(np.asarray, score(state.params, rows, direction)))
        masks.append(rows["mask"])
    losses, *others, conflicts = zip(*found)
    totals, total_errors, scores, errors = (
        np.concatenate(parts, axis=1)[:, : len(indices)] for parts in others
    )
    result = Windows(
        indices,
        starts,
        np.concatenate(masks)[: len(indices)].sum(1).astype(int),
        np.concatenate(losses)[: len(indices)],
        totals,
        total_errors,
        scores,
        errors,
    )
    ids = [task.examples.id(index) for index in indices]
    check_sums(ids, result, int(sum(conflicts)), TOLERANCES[config.dtype])
    return result


def make_directions(
    row_losses: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    order: int,
    microbatches: int,
):
    """Jitted, ``(state, train_rows, val_rows) -> directions`` of a step, as ``make_step`` has them:
    stacked, [K * PARTS] on every leaf.
    """

    update = make_update(optimizer)
    directed = make_directed(row_losses, optimizer, order, is_saving=microbatches > 1)

    @jax.jit
    def find(state: TrainState, train_rows: Any, val_rows: Any):
        params, opt_state = state.params, state.opt_state
        _, grads = gradient_in_parts(row_losses, params, in_parts(train_rows, microbatches))
        updates = update(params, opt_state, grads)
        return directed(params, opt_state, grads, updates, val_rows).directions

    return find


def make_scores(row_losses: Callable[[Any, Any], jax.Array], batch_size: int):
    """Jitted, ``(params, rows, direction) -> losses [R]``, then scores and errors [K, R] of rows,
    scores and errors [K, R, T] of positions, and conflicts.

    Args:
      batch_size: B, as a row's share of an update is one B-th of what its gradient does.
    """

    @jax.jit
    def score(params: Any, rows: Any, direction: Any):
        shape = rows["inputs"].shape
        count = shape[0] * shape[1]
        fn = value_grad_and_dots(mean_and_losses(row_losses), has_aux=True)
        # The rows' scores do without labels, so that the sums prove something.
        of_rows = fn(params, rows, direction=direction)
        of_places = fn(
            params,
            rows,
            direction=direction,
            labels=jnp.arange(count).reshape(shape),
            num_labels=count,
        )

        def by_set(total, shape):
            parts = total.reshape(-1, PARTS, *shape) / batch_size
            return parts.mean(1), jax.vmap(fidelity.standard_error)(parts)

        return (
            of_rows.aux,
            *by_set(of_rows.total(), shape[:1]),
            *by_set(of_places.total(), shape),
            of_places.conflicts,
        )

    return score


def check_sums(ids: Sequence[str], windows: Windows, conflicts: int, tolerance: float) -> None:
    """Raises ``StoppedError`` unless positions add up to windows.

    ``|sum_t scores[t] - total| <= tolerance * sum_t |scores[t]|`` in every window and set.
    """
    if conflicts:
        raise StoppedError(
            f"stopped: at {conflicts} places gradient belongs to several positions at once"
        )
    scores = windows.scores.astype(np.float64)
    differences = np.abs(scores.sum(-1) - windows.totals)
    within = differences <= tolerance * np.abs(scores).sum(-1)  # False for NaN
    for row in np.flatnonzero(~within.all(0)):
        if not np.isfinite(scores[:, row]).all() or not np.isfinite(windows.totals[:, row]).all():
            raise StoppedError(f"stopped: a score of {ids[row]} is not finite at this checkpoint")
        k = int(np.flatnonzero(~within[:, row])[0])
        raise StoppedError(
            f"stopped: the positions of {ids[row]} from token {windows.starts[row]} on add up to "
            f"{scores[k, row].sum():.6e}, but the row's score is {windows.totals[k, row]:.6e}"
        )
