"""Runs that are killed, by SIGKILL, in processes that are forked: an import would take longer."""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.runs import small_run

STEPS, EVERY = 24, 2
SHORT_STEPS = 2


def main(folder):
    """Leaves runs of STEPS steps in random/, of SHORT_STEPS in calls/, and prints what it did."""
    # The disk is slow, and syncing it is for losing power, not for being killed.
    os.fsync = lambda descriptor: None
    for name in ("random", "calls"):
        (folder / name).mkdir()
    begin = time.perf_counter()
    in_child(lambda: small_run.write(folder / "whole", STEPS, EVERY))
    in_child(lambda: small_run.write(folder / "short", SHORT_STEPS, 1))
    longest = (time.perf_counter() - begin) / 4

    kills, runs, rng = 0, 0, random.Random(0)
    while kills < 6:
        out = folder / "random" / str(runs)
        small_run.begin(out)
        runs += 1
        while in_child(
            lambda out=out: small_run.resume(out, STEPS, EVERY),
            rng.uniform(0, longest) if kills < 20 else None,
        ):
            kills += 1
    calls = 0
    while killed_at_call(folder / "calls" / str(calls), calls):
        calls += 1
    print(json.dumps({"kills": kills, "calls": calls}))


def killed_at_call(out, call):
    """A run that is killed before a system call, some of them once more, and goes on to the end."""
    small_run.begin(out)
    was_killed = in_child(lambda: resume_until(out, call))
    if call % 3 == 0:
        in_child(lambda: resume_until(out, call // 3))
    assert not in_child(lambda: small_run.resume(out, SHORT_STEPS, 1))
    return was_killed


def resume_until(out, call):
    kill_before(call)
    small_run.resume(out, SHORT_STEPS, 1)


def kill_before(call):
    """Has this process killed before a system call that changes files, by its number."""
    left = [call]

    def killing(function):
        def replaced(*args, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **options)

        return replaced

    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, killing(getattr(os, name)))


def in_child(work, seconds=None):
    """Whether it was killed before it was done."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
