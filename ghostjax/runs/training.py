"""The training step, which scores its rows, and the loop over steps."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax import directions, value_grad_and_dots
from ghostjax.runs.batches import draw_starts, make_rows, visit_order
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.documents import Document
from ghostjax.runs.models import GPT, SIZES


class DivergedError(RuntimeError):
    """A loss or a score is not finite, so nothing after it means anything."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one step hands to the next.

    Attributes:
      params, opt_state: as in any optax loop.
      grads: of the step before, where the optimizer's update is linearised: it is known before the
        pass over the training rows. At the start, those of the first batch.
    """

    params: Any
    opt_state: Any
    grads: Any


@dataclasses.dataclass(frozen=True)
class Visits:
    """What one step did with its B documents.

    Attributes:
      step: counted from 0.
      loss, val_loss: mean losses of the B training and V held-out rows, in nats per token, before
        the step's update.
      learning_rate: of this step.
      indices: [B], which documents.
      starts: [B], the first token of the window of each.
      scores: [B] float32, nats per token: the first-order decrease of ``val_loss`` that row i's
        share of the optimizer's update causes. Positive helps.
    """

    step: int
    loss: float
    val_loss: float
    learning_rate: float
    indices: np.ndarray
    starts: np.ndarray
    scores: np.ndarray


def make_row_losses(model: GPT) -> Callable[[Any, dict], jax.Array]:
    """The loss function ``(params, rows) -> losses [N]``: mean cross-entropy over masked positions.

    ``losses[r] = sum_t mask[r, t] * nll[r, t] / sum_t mask[r, t]``, in nats per token.
    """

    def row_losses(params, rows):
        logits = model.apply({"params": params}, rows["inputs"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        return jnp.sum(nll * rows["mask"], axis=-1) / jnp.sum(rows["mask"], axis=-1)

    return row_losses


def init_params(model: GPT, length: int, seed: int) -> Any:
    """The model's initial parameters."""
    ids = jnp.zeros((1, length), jnp.int32)
    return jax.jit(model.init)(jax.random.key(seed), ids)["params"]


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable,
    train_rows: dict[str, np.ndarray],
) -> TrainState:
    """The state before the first step, which is to see ``train_rows``."""
    grads = jax.jit(jax.grad(loss_fn))(params, train_rows)
    return TrainState(params, jax.jit(optimizer.init)(params), grads)


def make_schedule(peak: float, steps: int) -> optax.Schedule:
    """Warm-up over a fifth of the steps, then cosine decay to a tenth of the peak.

    No step has learning rate zero: its documents would get scores of zero whatever they hold. The
    warm-up is long because the first gradients are by far the largest and much alike for all text;
    at a high learning rate, a document's score would depend on when it is visited first.
    """
    warmup = max(1, steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak / 10,
    )
    return lambda count: schedule(count + 1)


def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW after clipping the gradient's norm to 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def make_loss(model: GPT) -> Callable[[Any, dict], jax.Array]:
    """The mean of the row losses."""
    row_losses = make_row_losses(model)
    return lambda params, rows: jnp.mean(row_losses(params, rows))


def make_step(loss_fn: Callable, optimizer: optax.GradientTransformation):
    """The jitted step ``(state, train_rows, val_rows) -> (state, loss, val_loss, scores)``.

    The update is that of plain training. The old state's buffers are reused.
    """
    value_grad_and_scores = value_grad_and_dots(loss_fn)

    def step(state, train_rows, val_rows):
        params, opt_state = state.params, state.opt_state
        val_loss, val_grads = jax.value_and_grad(loss_fn)(params, val_rows)
        direction = directions.through_optimizer(
            optimizer, opt_state, params, state.grads, val_grads
        )
        result = value_grad_and_scores(params, train_rows, direction=direction)
        updates, opt_state = optimizer.update(result.grads, opt_state, params)
        state = TrainState(optax.apply_updates(params, updates), opt_state, result.grads)
        scores = result.total()
        return state, result.value, val_loss, scores / len(scores)

    return jax.jit(step, donate_argnums=0)


def train(
    config: TrainConfig, documents: Sequence[Document], val_documents: Sequence[Document]
) -> Iterator[Visits]:
    """Trains ``config.steps`` steps; yields what each did.

    Everything drawn at random depends on ``config.seed`` alone. Each step takes the next B
    documents of ``visit_order`` and V held-out documents, drawn anew without replacement.

    Raises:
      DivergedError: a loss or a score is not finite.
    """
    model = GPT(SIZES[config.model])
    length = config.positions
    schedule = make_schedule(config.peak_learning_rate, config.steps)
    learning_rates = np.asarray(schedule(jnp.arange(config.steps)))
    optimizer = make_optimizer(schedule)
    loss_fn = make_loss(model)
    step_fn = make_step(loss_fn, optimizer)
    state = None

    order_rng, val_rng, window_rng = np.random.default_rng(config.seed).spawn(3)
    order = visit_order(len(documents), config.batch_size, order_rng)
    for step in range(config.steps):
        indices = next(order)
        val_indices = val_rng.choice(len(val_documents), config.val_batch_size, replace=False)
        batch = [documents[i] for i in indices] + [val_documents[i] for i in val_indices]
        starts = draw_starts(batch, length, window_rng)
        rows = make_rows(batch, starts, length)
        train_rows = {name: array[: config.batch_size] for name, array in rows.items()}
        val_rows = {name: array[config.batch_size :] for name, array in rows.items()}
        if state is None:
            params = init_params(model, length, config.seed)
            state = init_state(params, optimizer, loss_fn, train_rows)
        state, loss, val_loss, scores = step_fn(state, train_rows, val_rows)
        visits = Visits(
            step=step,
            loss=float(loss),
            val_loss=float(val_loss),
            learning_rate=float(learning_rates[step]),
            indices=indices,
            starts=starts[: config.batch_size],
            scores=np.asarray(scores),
        )
        if not np.isfinite([visits.loss, visits.val_loss, *visits.scores]).all():
            raise DivergedError(
                f"training diverged at step {step} (a loss or score is not finite): "
                "lower --learning-rate"
            )
        yield visits
