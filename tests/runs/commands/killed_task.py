"""A task whose processes tell where they are, and stay there for a while, to be killed."""

import dataclasses
import os
import pathlib
import time

from tests.runs.commands import test_devices

HERE, MOMENT = "GHOSTJAX_TEST_HERE", "GHOSTJAX_TEST_MOMENT"


def stay(moment):
    """In Python, as a thread that waits for the interpreter likes it least."""
    if os.environ.get(MOMENT) == moment:
        pathlib.Path(os.environ[HERE]).touch()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sum(range(10**5))


def make_task():
    stay("data")
    task = test_devices.make_task()

    def row_losses(params, batch):
        stay("compiling")
        return task.row_losses(params, batch)

    return dataclasses.replace(task, row_losses=row_losses)
