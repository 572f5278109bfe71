"""The data that the options of a run name."""

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.arrays import load_arrays
from ghostjax.runs.data.task import Task
from ghostjax.runs.data.text import load_texts
from ghostjax.runs.errors import UsageError


def load_task(config: TrainConfig) -> Task:
    """The data that the options name, or texts of the Python installation.

    Raises:
      UsageError: they cannot be read, or a batch is larger than the data.
    """
    files = [*config.train, *(path for paths in config.val_files.values() for path in paths)]
    arrays = [path.suffix == ".npz" for path in files]
    if any(arrays) and not all(arrays):
        text = files[arrays.index(False)]
        raise UsageError(f"{text}: expected .npz, as other files are: texts and arrays do not mix")
    task = load_arrays(config) if any(arrays) else load_texts(config)
    sizes = [("--batch-size", config.batch_size, "training examples", len(task.examples))]
    for name, size in task.val_sizes.items():
        what = f"examples of validation set {name}"
        sizes.append(("--val-batch-size", config.val_batch_size, what, size))
    for option, size, what, found in sizes:
        if size > found:
            raise UsageError(f"{option} {size} is more than the {found} {what} there are")
    return task
