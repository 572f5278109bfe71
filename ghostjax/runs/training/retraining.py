"""A run once more, without some of its examples and without scores."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.batches import generator
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.errors import StoppedError
from ghostjax.runs.training.step import make_plain_step
from ghostjax.runs.training.trainer import Trainer, train_batches

TIMED_STEPS = 16


class Retraining:
    """Trains a run's model anew, with its own start, batches, windows and learning rates.

    Attributes:
      sets: names of the validation sets, K of them.
    """

    def __init__(self, config: TrainConfig, task: LoadedTask, init: Callable[[], Any]):
        """``init`` gives the parameters to start from, new ones every time."""
        self._config, self._task, self._init = config, task, init
        self._trainer = Trainer(config, task)
        self.sets = list(task.val_sizes)

        def weighted_losses(params: Any, rows: Any) -> jax.Array:
            # A loss of weight 0 that is not finite would be NaN.
            losses = task.row_losses(params, rows["rows"])
            return jnp.where(rows["weight"] > 0, losses, 0)

        self._step = make_plain_step(
            weighted_losses, self._trainer.optimizer, microbatches=config.microbatches
        )
        self._row_losses = jax.jit(task.row_losses)

    def losses_without(self, left_out: np.ndarray) -> np.ndarray:
        """[K], the mean losses at the end of all validation examples, a window each.

        The loss of a step is ``sum over rows i that are not left out of l_i / B``.

        Args:
          left_out: [n] bool, which of the training examples.

        Raises:
          StoppedError: a loss is not finite.
        """
        losses = self._val_losses(self._trained(left_out, self._config.steps))
        if not np.isfinite(losses).all():
            raise StoppedError(
                f"stopped: without {left_out.sum()} examples a validation loss is not finite"
            )
        return losses

    def seconds(self) -> float:
        """About what a retraining takes, measured by a few steps."""
        nothing = np.zeros(len(self._task.examples), bool)
        self._val_losses(self._trained(nothing, 1))  # compiles

        def seconds_of(call, *args):
            begin = time.perf_counter()
            result = call(*args)
            return result, time.perf_counter() - begin

        params, start = seconds_of(self._trained, nothing, 0)
        _, more = seconds_of(self._trained, nothing, TIMED_STEPS)
        _, last = seconds_of(self._val_losses, params)
        return start + max(more - start, 0) * self._config.steps / TIMED_STEPS + last

    def _trained(self, left_out: np.ndarray, steps: int) -> Any:
        """The parameters after so many steps."""
        state = self._trainer.init_state(self._init())
        for batch in itertools.islice(train_batches(self._config, self._task), steps):
            weight = np.float32(~left_out[batch.indices])
            state, _ = self._step(state, {"rows": batch.rows, "weight": weight})
        return jax.block_until_ready(state.params)

    def _val_losses(self, params: Any) -> np.ndarray:
        """[K]. The last row is there several times, so that all calls have one shape."""
        found, size = [], self._config.val_batch_size
        for name in self.sets:
            count, losses = self._task.val_sizes[name], []
            # Windows are drawn one after another, as for all rows at once.
            rng = generator(self._config.seed, f"retraining {name}", 0)
            for start in range(0, count, size):
                own = np.arange(start, min(start + size, count))
                rows = self._task.val_rows(name, own, rng)
                places = np.minimum(np.arange(size), len(own) - 1)
                rows = jax.tree.map(lambda leaf, places=places: leaf[places], rows)
                losses.append(self._row_losses(params, rows))
            found.append(np.concatenate(losses)[:count].astype(np.float64).mean())
        return np.array(found)
