"""Whether all processes are about to make the same run, before anything needs all of them."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ghostjax.runs.errors import UsageError
from ghostjax.runs.processes.together import check_same
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.fingerprint import fingerprint

SEEN = 60.0  # seconds, within which a file that one host has written is seen by all

_PROGRAMS = ("row_losses", "optimizer")
_NOTHING = "0" * 64  # in the place of a digest


def check_same_run(out: Path, resumed: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ``UsageError`` in all processes where options, data, initial parameters or what the
    run directory holds (``resumed``: of ``run.json``) are not the same."""
    begun = [resumed or {}, checkpoints.latest(out)]
    texts = {"the options": metadata["options"], f"the contents of {out}": begun}
    digests = {name: fingerprint(json.dumps(text, sort_keys=True)) for name, text in texts.items()}
    check_same(digests | {f"the {name}": own for name, own in metadata["fingerprints"].items()})


def check_same_programs(programs: Mapping[str, str]) -> None:
    """Raises ``UsageError`` in all processes where a task's functions compute something else.

    Programs that exchange other arrays would wait for each other without end.
    """
    check_same({f"the task's {name}": programs.get(name, _NOTHING) for name in _PROGRAMS})


def wait_until_seen(out: Path) -> None:
    """Raises ``UsageError`` where the directory that the first process wrote is not seen here.
    Network file systems remember for a while that it was not there."""
    limit = time.monotonic() + SEEN
    while not (out / "run.json").exists():
        if time.monotonic() > limit:
            raise UsageError(
                f"process {jax.process_index()} does not see {out}, which process 0 has written: "
                "give an --out on a file system that all processes share"
            )
        time.sleep(0.1)
