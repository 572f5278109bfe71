"""The training step, which scores its rows, and the loop over steps."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax.linen import GradDotProdEngine
from ghostjax.runs.batches import draw_starts, make_rows, visit_order
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.documents import Document
from ghostjax.runs.models import GPT, SIZES


class DivergedError(RuntimeError):
    """A loss or an inner product is not finite, so nothing after it means anything."""


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
      dots: [B], ``dots[i] = <d loss_i / d params, d val_loss / d params>``, float32.
    """

    step: int
    loss: float
    val_loss: float
    learning_rate: float
    indices: np.ndarray
    starts: np.ndarray
    dots: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """[B] in float64: ``scores[i] = learning_rate / B * dots[i]``, in nats per token.

        The first-order decrease of ``val_loss`` that row i's share of one plain gradient step,
        ``params - learning_rate * d loss / d params``, causes. Positive helps.
        """
        return float(self.learning_rate) / len(self.dots) * self.dots.astype(np.float64)


def make_row_losses(model: GPT) -> Callable[[Any, dict], jax.Array]:
    """The loss function ``(params, rows) -> losses [N]``: mean cross-entropy over masked positions.

    ``losses[r] = sum_t mask[r, t] * nll[r, t] / sum_t mask[r, t]``, in nats per token.
    """

    def row_losses(params, rows):
        logits = model.apply({"params": params}, rows["inputs"], rows["positions"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        return jnp.sum(nll * rows["mask"], axis=-1) / jnp.sum(rows["mask"], axis=-1)

    return row_losses


def init_params(model: GPT, length: int, seed: int) -> Any:
    """The model's initial parameters."""
    ids = jnp.zeros((1, length), jnp.int32)
    return jax.jit(model.init)(jax.random.key(seed), ids, ids)["params"]


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


def make_step(row_losses: Callable, optimizer: optax.GradientTransformation, val_batch_size: int):
    """The jitted step ``(params, opt_state, rows) -> (params, opt_state, value, val_value, dots)``.

    ``rows`` are N = B + V rows, training first. The update is that of plain training on the B rows.
    The buffers of the old parameters and optimizer state are reused.
    """
    engine = GradDotProdEngine(row_losses, val_batch_size=val_batch_size)

    def step(params, opt_state, rows):
        result = engine(params, rows)
        updates, opt_state = optimizer.update(result.grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, result.value, result.val_value, result.total()

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    config: TrainConfig, documents: Sequence[Document], val_documents: Sequence[Document]
) -> Iterator[Visits]:
    """Trains ``config.steps`` steps; yields what each did.

    Everything drawn at random depends on ``config.seed`` alone. Each step takes the next B
    documents of ``visit_order`` and V held-out documents, drawn anew without replacement.

    Raises:
      DivergedError: a loss or an inner product is not finite.
    """
    model = GPT(SIZES[config.model])
    length = config.positions
    schedule = make_schedule(config.peak_learning_rate, config.steps)
    learning_rates = np.asarray(schedule(jnp.arange(config.steps)))
    optimizer = make_optimizer(schedule)
    step_fn = make_step(make_row_losses(model), optimizer, config.val_batch_size)
    params = init_params(model, length, config.seed)
    opt_state = jax.jit(optimizer.init)(params)

    order_rng, val_rng, window_rng = np.random.default_rng(config.seed).spawn(3)
    order = visit_order(len(documents), config.batch_size, order_rng)
    for step in range(config.steps):
        indices = next(order)
        val_indices = val_rng.choice(len(val_documents), config.val_batch_size, replace=False)
        batch = [documents[i] for i in indices] + [val_documents[i] for i in val_indices]
        starts = draw_starts(batch, length, window_rng)
        rows = make_rows(batch, starts, length)
        params, opt_state, loss, val_loss, dots = step_fn(params, opt_state, rows)
        visits = Visits(
            step=step,
            loss=float(loss),
            val_loss=float(val_loss),
            learning_rate=float(learning_rates[step]),
            indices=indices,
            starts=starts[: config.batch_size],
            dots=np.asarray(dots),
        )
        if not np.isfinite([visits.loss, visits.val_loss, *visits.dots]).all():
            raise DivergedError(
                f"training diverged at step {step} (a loss or score is not finite): "
                "lower --learning-rate"
            )
        yield visits
