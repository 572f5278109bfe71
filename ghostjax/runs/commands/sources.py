"""The data that a run was started with, once more."""

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.load import load_task
from ghostjax.runs.data.task import Task
from ghostjax.runs.errors import UsageError
from ghostjax.runs.loop.run_log import TASK
from ghostjax.runs.store.fingerprint import fingerprint
from ghostjax.runs.store.run import Run


def read_task(source: Run) -> tuple[TrainConfig, Task]:
    """The options and the data of a run, read again.

    Raises:
      UsageError: the data cannot be read, changed since the run began, or are those of a training
        loop of one's own.
    """
    if source.metadata.get("task") == TASK:
        raise UsageError(f"{source.path} is the log of another training loop, which has the data")
    begun = source.begun()
    config = TrainConfig(source.path).resumed(begun["options"])
    try:
        task = load_task(config)
    except UsageError as error:
        raise UsageError(
            f"the data of {source.path} cannot be read again, needed where the run was started: "
            f"{error}"
        ) from error
    if begun["fingerprints"]["data"] != fingerprint(task.contents()):
        raise UsageError(f"{source.path}: the data changed since the run began")
    return config, task
