"""A task of several processes, which one of them may do otherwise, or stay in, to be killed."""

import dataclasses
import os
import pathlib
import time

from tests.runs.commands import test_devices

HERE, MOMENT = "GHOSTJAX_TEST_HERE", "GHOSTJAX_TEST_MOMENT"
OTHERWISE = "GHOSTJAX_TEST_OTHERWISE"


def stay(moment):
    """In Python, as a thread that waits for the interpreter likes it least."""
    if os.environ.get(MOMENT) == moment:
        pathlib.Path(os.environ[HERE]).touch()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sum(range(10**5))


def make_task():
    stay("data")
    task, otherwise = test_devices.make_task(), os.environ.get(OTHERWISE)
    if otherwise == "fewer rows":
        return dataclasses.replace(task, train=task.train[1:])
    if otherwise == "a fault":
        raise RuntimeError("the task is broken,\nhere alone")

    def row_losses(params, batch):
        stay("compiling")
        losses = task.row_losses(params, batch)
        return losses + params["in"].mean() if otherwise == "another loss" else losses

    return dataclasses.replace(task, row_losses=row_losses)
