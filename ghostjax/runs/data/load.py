"""The data that the options of a run name."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ghostjax._task import Task
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.arrays import load_arrays
from ghostjax.runs.data.own import OwnTask, find_task, made_task
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.data.text import load_texts
from ghostjax.runs.errors import UsageError


def load_task(
    config: TrainConfig,
    task: Task | Callable[[], Task] | None = None,
    folders: Sequence[Path] = (),
) -> LoadedTask:
    """The data that the options name, or texts of the Python installation.

    Args:
      task: What ``config.task`` is a name of. None: it is found by that name.
      folders: Where the module of ``config.task`` may be, beside the working directory.

    Raises:
      UsageError: they cannot be read, or a batch is larger than the data.
    """
    if task is not None:
        loaded: LoadedTask = OwnTask(made_task(task, config.task or ""))
    elif config.task is not None:
        loaded = OwnTask(find_task(config.task, [Path.cwd(), *folders]))
    else:
        loaded = _load_files(config)
    sizes = [("--batch-size", config.batch_size, "training examples", len(loaded.examples))]
    for name, size in loaded.val_sizes.items():
        what = f"examples of validation set {name}"
        sizes.append(("--val-batch-size", config.val_batch_size, what, size))
    for option, size, what, found in sizes:
        if size > found:
            raise UsageError(f"{option} {size} is more than the {found} {what} there are")
    return loaded


def _load_files(config: TrainConfig) -> LoadedTask:
    files = [*config.train_files, *(path for paths in config.val_files.values() for path in paths)]
    arrays = [path.suffix == ".npz" for path in files]
    if any(arrays) and not all(arrays):
        text = files[arrays.index(False)]
        raise UsageError(f"{text}: expected .npz, as other files are: texts and arrays do not mix")
    return load_arrays(config) if any(arrays) else load_texts(config)
