"""aggregate_and_log: dots in one line to the log that the commands read."""

from collections.abc import Sequence
from typing import Any, Protocol

import chex
import jax

from ghostjax._aggregate import aggregate
from ghostjax._kinds import by_kind


class Log(Protocol):
    """What ``aggregate_and_log`` writes to, as ``ghostjax.RunLog``."""

    def add(self, step: int, ids: Any, scores: Any, /, **columns: Any) -> None: ...


def aggregate_and_log(
    dots: Any, log: Log, *, step: int, ids: Sequence[Any], scale: Any = 1.0, **columns: Any
) -> jax.Array:
    """Sums a tree of per-row inner products over its parameters, and adds them to a log.

        total[i] = sum_p dots[p][i],      the score in the log: scale * total[i]

    The log also gets what each kind of layer has in the scores, as ``by_kind`` tells kinds, for the
    report. Outside ``jax.jit``.

    Args:
      dots: tree whose leaves are all [B_train] and floating point.
      log: a ``ghostjax.RunLog`` of one validation set.
      step, ids, columns: as ``RunLog.add`` takes them; ids are [B_train].
      scale: what makes dots predicted decreases of the validation loss: for plain SGD on the mean
        of the rows' losses, the learning rate over B_train.

    Returns:
      [B_train], the sums, as ``aggregate`` gives them.

    Raises:
      ValueError: ``dots`` has no leaves.
      AssertionError: a leaf is not [B_train] or not floating point (checked with chex before
        anything is summed).
      What ``log.add`` raises; nothing is logged then.

    >>> import tempfile, jax.numpy as jnp, ghostjax
    >>> dots = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5, -2.0])}
    >>> with ghostjax.RunLog(tempfile.mkdtemp()) as log:
    ...     aggregate_and_log(dots, log, step=0, ids=["a", "b"], scale=0.1)
    Array([1.5, 0. ], dtype=float32)
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(dots):
        name = jax.tree_util.keystr(path) or "dots"
        expected = f"{name}: expected dots [B_train], one for each of {len(ids)} ids."
        chex.assert_shape(leaf, (len(ids),), custom_message=expected)
    total = aggregate(dots)
    kinds = {kind: scale * own for kind, own in by_kind(dots).items()}
    log.add(step, ids, scale * total, **{"kinds": kinds, **columns})
    return total
