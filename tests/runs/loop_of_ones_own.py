"""A loop of one's own that is killed and goes on, in processes that are forked."""

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

from ghostjax.runs.loop.run_log import RunLog
from tests.runs.store.killed_log import in_child, kill_before

STEPS, EVERY = 20, 3
SETS = ("a", "b")


def batch(step):
    rng = np.random.default_rng(step)
    ids = [f"id {n}" for n in rng.integers(9, size=4)]
    return ids, rng.standard_normal((2, 4)).astype(np.float32)


def log_steps(out, steps=STEPS, step=None):
    """Opens the log, goes on where it ends, and finishes it."""
    with RunLog(out, SETS, flush_every=EVERY, resume=True, step=step) as log:
        for number in range(log.step, steps):
            ids, scores = batch(number)
            log.add(number, ids, scores, domains=[name[-1] for name in ids], learning_rate=0.5)


def main(folder):
    os.fsync = lambda descriptor: None  # the disk is slow, and syncing it is for losing power
    begin = time.perf_counter()
    in_child(lambda: log_steps(folder / "whole"))
    longest, rng, kills, runs = time.perf_counter() - begin, random.Random(0), 0, 0
    while kills < 6:
        out = folder / "random" / str(runs)
        runs += 1
        while in_child(lambda out=out: log_steps(out), rng.uniform(0, longest) * (kills < 20)):
            kills += 1
    call, was_killed = 0, True
    while was_killed:
        out = folder / "calls" / str(call)
        was_killed = in_child(lambda out=out, call=call: cut_and_killed(out, call))
        in_child(lambda out=out: log_steps(out))
        call += 1
    print(json.dumps({"kills": kills, "calls": call}))


def cut_and_killed(out, call):
    """Killed before a system call of a log that is begun, cut within a part, and made again."""
    kill_before(call)
    log_steps(out, 7)
    log_steps(out, 8, step=4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
