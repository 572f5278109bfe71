"""The data that a run was started with, once more."""

from pathlib import Path
from typing import Any

from ghostjax._task import IN_PYTHON
from ghostjax.runs.commands.unchanged import check_data
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.load import load_task
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.loop.run_log import TASK
from ghostjax.runs.store.fingerprint import fingerprints
from ghostjax.runs.store.run import Run
from ghostjax.runs.store.weights import read_weights


def read_task(source: Run) -> tuple[TrainConfig, LoadedTask]:
    """The options and the data of a run, read again.

    Raises:
      UsageError: the data cannot be read, changed since the run began, or are those of a training
        loop or a task in Python that has no name.
    """
    if source.metadata.get("task") == TASK:
        raise UsageError(f"{source.path} is the log of another training loop, which has the data")
    begun = source.begun()
    config = TrainConfig(source.path).resumed(begun["options"])
    if config.task == IN_PYTHON:
        raise UsageError(f"{source.path} was started in Python, with a task that has no name")
    try:
        task = load_task(config, folders=[Path(begun["folder"])] if "folder" in begun else [])
    except UsageError as error:
        raise UsageError(
            f"the data of {source.path} cannot be read again, needed where the run was started: "
            f"{error}"
        ) from error
    check_data(begun, *fingerprints(task.contents()), source.path)
    return config, task


def initial_params(config: TrainConfig, task: LoadedTask) -> Any:
    """What a run with these options starts from; a new copy, as training gives up its buffers."""
    params = task.init_params(config.seed)
    return params if config.init_from is None else read_weights(config.init_from, params)
