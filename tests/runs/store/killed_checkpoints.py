"""Checkpoints of a process that is killed, by SIGKILL, while it saves."""

import importlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from ghostjax.runs.store import checkpoints

KILLS = 5


def state(step):
    """Different in every number at every step."""
    rng = np.random.default_rng(step)
    kernels = [jax.numpy.asarray(rng.standard_normal((64, 64), np.float32)) for _ in range(8)]
    return {"kernels": kernels, "step": jax.numpy.int32(step)}


def check(out, step):
    """That the checkpoint of the step is what was saved then."""
    restored = checkpoints.restore(out, step, state(0))
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state(step))):
        np.testing.assert_array_equal(found, expected, strict=True)


def work(out, pipe):
    step = checkpoints.latest(out)
    if step is not None:
        check(out, step)
    for after in range(0 if step is None else step + 1, 10**6):
        checkpoints.save(out, after, state(after))
        os.write(pipe, b".")


def main(out):
    """Lets a process save until it is killed, its successor too, and so on."""
    importlib.import_module("orbax.checkpoint")  # once, before forking
    rng = random.Random(0)
    for _ in range(KILLS):
        saved, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                work(out, pipe)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(pipe)
        os.read(saved, 1)  # it has saved once, and goes on
        time.sleep(rng.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == -signal.SIGKILL, code
        os.close(saved)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
