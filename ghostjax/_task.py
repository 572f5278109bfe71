"""A task of one's own: what ``ghostjax.run`` and ``ghostjax train --task`` train and score."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

IN_PYTHON = "python"  # the name of a task that cannot be found by name


class Source(Protocol):
    """Examples by number: a sequence, a PyGrain ``RandomAccessDataSource`` or ``MapDataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, parameters, losses and optimizer of a run, of whatever framework.

        losses[r] = row_losses(params, batch)[r],      the step's loss = sum_r losses[r] / B

    An example is a mapping. Its keys ``id``, ``domain`` and ``excerpt``, text all, are for the log;
    the rest, arrays or trees of arrays, are its row of a batch: stacked, [B, ...], under their
    names. Without an ``id`` it is ``train:<number>``, without a ``domain`` that is ``train``.

    Attributes:
      train: The training examples, in the same shapes all. Which of them a step sees is drawn by
        the run, from its seed and the step alone, so give them unshuffled and unbatched; an example
        must be the same whenever it is read.
      val: By name, the held-out examples of each validation set, at least one; of the same shapes
        in all sets.
      init: ``init(seed) -> params``, a tree of floating-point arrays: a dictionary; the
        ``nnx.State`` of ``nnx.split(model, nnx.Param, ...)``; the first part of
        ``eqx.partition(model, eqx.is_inexact_array)``.
      row_losses: ``row_losses(params, batch) -> losses`` [B], floating point, of which every row is
        a loss of that row alone. It is called with batches of several sizes.
      optimizer: An optax ``GradientTransformation`` with its learning rate in it. None: what
        ``optimizer``, ``learning_rate`` and ``clip`` of the run say.
      unit: Of the loss, in words, such as "nats".

    What is wrong with a task is told when a run begins, before anything is written, as an error of
    one line: duplicate ids, shapes that differ, no validation set, losses that are not [B], rows
    that are mixed, a loss that is not finite at the initial parameters.

    >>> import jax.numpy as jnp
    >>> examples = [{"id": f"n{n}", "x": float(n)} for n in range(8)]
    >>> task = Task(
    ...     train=examples[:6],
    ...     val={"last": examples[6:]},
    ...     init=lambda seed: {"mean": jnp.zeros(())},
    ...     row_losses=lambda params, batch: (batch["x"] - params["mean"]) ** 2,
    ... )
    >>> task.row_losses(task.init(0), {"x": jnp.arange(3.0)})
    Array([0., 1., 4.], dtype=float32)
    """

    train: Source
    val: Mapping[str, Source]
    init: Callable[[int], Any]
    row_losses: Callable[[Any, Any], jax.Array]
    optimizer: Any = None
    unit: str = "the unit of the loss"
