"""``ghostjax train`` as a function."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghostjax._task import IN_PYTHON, Task


def run(task: Task | Callable[[], Task] | str, out: str | Path, **options: Any) -> dict[str, Any]:
    """Trains a task of your own and scores every training example, as ``ghostjax train`` does.

    The run directory ``out`` gets the same files, so that ``ghostjax rank``, ``report`` and
    ``diff`` work on it.

    Args:
      task: A ``Task``, a function that returns one, or its name, ``"module:function"``, with which
        ``ghostjax train --resume`` can go on, too.
      out: The run directory to write. It must be new or empty, but for ``resume=True``.
      options: Those of ``ghostjax train --help`` that are not about its own models and data, by
        their names with underscores: ``steps=256, batch_size=32, score_every=4, resume=True``.

    Returns:
      What ``summary.json`` holds.

    Guarantees: the same task, options and machine give the same log, bit for bit, resumed or not.

    Raises:
      ghostjax.runs.UsageError: task or options cannot be used; nothing was written.
      ghostjax.runs.errors.StoppedError: training cannot go on; what came before is kept.
      ModuleNotFoundError: ``ghostjax[train]`` is not installed.

    >>> import jax.numpy as jnp, optax, pathlib, tempfile
    >>> examples = [{"id": f"n{n}", "x": float(n)} for n in range(8)]
    >>> task = Task(
    ...     train=examples[:6],
    ...     val={"last": examples[6:]},
    ...     init=lambda seed: {"mean": jnp.zeros(())},
    ...     row_losses=lambda params, batch: (batch["x"] - params["mean"]) ** 2,
    ...     optimizer=optax.sgd(0.1),
    ... )
    >>> out = pathlib.Path(tempfile.mkdtemp()) / "run"
    >>> options = {"steps": 4, "batch_size": 2, "val_batch_size": 2, "mesh": "data=1"}
    >>> summary = run(task, out, **options, quiet=True)
    >>> summary["steps"], sorted(path.name for path in out.iterdir())[:3]
    (4, ['checkpoints', 'examples.parquet', 'log'])
    """
    try:
        from ghostjax.runs.commands import train
        from ghostjax.runs.config import TrainConfig
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ghostjax"):
            raise
        raise ModuleNotFoundError(
            f'ghostjax.run needs {error.name}: pip install "ghostjax[train]"', name=error.name
        ) from error
    if options.get("init_from") is not None:
        options["init_from"] = Path(options["init_from"])
    config = TrainConfig(out=Path(out), task=_name_of(task), **options)
    given = set(options) | ({"task"} if isinstance(task, str) else set())
    return train.run(config, given, None if isinstance(task, str) else task)


def _name_of(task: Any) -> str:
    if isinstance(task, str):
        return task
    is_found = inspect.isfunction(task) and task.__module__ != "__main__"
    if is_found and task.__qualname__.isidentifier():
        return f"{task.__module__}:{task.__qualname__}"
    return IN_PYTHON
