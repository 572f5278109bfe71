"""What each peer's own process does: errors on small probes, then costs on the shared work.

Neither JAX nor torch is imported here, so that a process has no threads but its framework's.
"""

import ctypes
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

THREADS = 2
EXACT = 1e-4  # float32 beside float64; what leaves out a term is further away
REPEATS = 3
# What torch warns of in the peers' names, whatever the model.
COLUMNS = ("error", "time", "cpu", "memory")
FRAMEWORK = ("Full backward hook is firing", "In CPU autocast")


class Problem:
    """A model with B training rows and, behind them, V validation rows.

    A framework's own kind says how one row's gradient is made by plain autodiff in float64, and
    gives the steps to compare with: ``plain()`` and ``floor()`` return functions without arguments.
    """

    train_rows: int
    val_rows: int

    def row_gradient(self, row: int) -> list[np.ndarray]:
        raise NotImplementedError

    def parameters(self) -> int:
        return sum(leaf.size for leaf in self.row_gradient(0))

    @functools.cached_property
    def expected(self) -> dict[str, list[np.ndarray]]:
        """Every quantity, from rows' gradients that are made one by one."""
        last = self.train_rows + self.val_rows
        total = None
        for row in range(self.train_rows, last):
            own = self.row_gradient(row)
            total = own if total is None else [a + b for a, b in zip(total, own)]
        dots, norms = [], []
        for row in range(self.train_rows):
            own = self.row_gradient(row)
            dots.append(sum(np.vdot(a, b) for a, b in zip(own, total)) / self.val_rows)
            norms.append(sum(np.vdot(a, a) for a in own))
        clipped = None
        for row in range(self.train_rows):
            scale = min(1, np.sqrt(np.median(norms) / norms[row]))
            own = [scale * leaf for leaf in self.row_gradient(row)]
            clipped = own if clipped is None else [a + b for a, b in zip(clipped, own)]
        return {
            "dots": [np.array(dots)],
            "squared norms": [np.array(norms)],
            "mean squared norm": [np.mean(norms)],
            "clipped gradient": clipped,
        }

    @property
    def max_norm(self) -> float:
        """Of the training rows' norms the median: half of the rows are clipped."""
        return float(np.sqrt(np.median(self.expected["squared norms"][0])))


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to one quantity: ``build(problem)`` returns a step, ``read`` its result as arrays."""

    quantity: str
    build: Callable[[Problem], Callable[[], Any]]
    read: Callable[[Any], list[np.ndarray]]


def largest_error(found, expected) -> float:
    """Of any array, relative to its largest entry, or a thousandth of the largest of all."""
    floor = 1e-3 * max(np.max(np.abs(want)) for want in expected)
    assert len(found) == len(expected), (len(found), len(expected))
    errors = []
    for leaf, want in zip(found, expected):
        assert np.shape(leaf) == np.shape(want), (np.shape(leaf), np.shape(want))
        errors.append(np.max(np.abs(leaf - want)) / max(np.max(np.abs(want)), floor))
    return float(max(errors))


def judged(method: Method, problem: Problem, package: str) -> tuple[dict, Callable | None]:
    """Outcome and error of one method, and its step where it has one.

    ``says``: the refusal, or what the peer warned of.
    """
    expected = problem.expected[method.quantity]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step = method.build(problem)
            found = method.read(step())
        except Exception as error:  # what a peer refuses with is not known beforehand
            says = str(error).strip().split("\n")[0][:200]
            if os.environ.get("PEERS_DEBUG"):
                traceback.print_exc()
            return {"outcome": "refused", "says": f"{type(error).__name__}: {says}"}, None
    error = largest_error(found, expected)
    row = {"outcome": "exact" if error <= EXACT else "wrong", "error": error}
    own = [str(w.message) for w in caught if f"{os.sep}{package}{os.sep}" in w.filename]
    own = [text for text in own if not text.startswith(FRAMEWORK)]
    if own:
        row["says"] = re.sub(r"\s+", " ", own[0])[:200]
    return row, step


def peak_mib(step: Callable[[], Any]) -> float:
    """How far resident memory rises while one warm step runs (Linux)."""

    def status(key: str) -> int:
        text = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+) kB", text)[1])

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = step()
    rise = (status("VmHWM") - before) / 1024
    del result
    return rise


def seconds(steps: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """Medians, by the clock and of all threads' work; steps take turns.

    Each turn is two calls of which the second counts.
    """
    samples = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            step()
            start, worked = time.perf_counter(), time.process_time()
            step()
            samples[name].append((time.perf_counter() - start, time.process_time() - worked))
    return {
        name: tuple(statistics.median(column) for column in zip(*pairs))
        for name, pairs in samples.items()
    }


def costs(problem: Problem, methods: dict[str, Method], package: str) -> dict[str, dict]:
    """Errors first; then time and memory over the framework's own plain step."""
    table = {"plain step": {}, "+ validation gradient": {}}
    steps = {"plain step": problem.plain(), "+ validation gradient": problem.floor()}
    for name, method in methods.items():
        table[name], step = judged(method, problem, package)
        table[name]["quantity"] = method.quantity
        if step is not None:
            steps[name] = step
    for step in steps.values():
        step()
    taken = seconds(steps)
    peaks = {name: peak_mib(step) for name, step in steps.items()}
    for name in steps:
        by_clock, work = (a / b for a, b in zip(taken[name], taken["plain step"]))
        table[name] |= {"time": by_clock, "cpu": work, "peak_mib": peaks[name]}
        table[name]["memory"] = peaks[name] / peaks["plain step"]
    return table


def report(
    packages: list[str],
    probes: Callable[[], dict[str, Callable[[], Problem]]],
    works: Callable[[], dict[str, Callable[[], Problem]]],
    methods: Callable[[], dict[str, Method]],
) -> None:
    """Writes what the first of ``packages`` does to the file named on the command line."""
    out = pathlib.Path(sys.argv[1])
    chosen = sys.argv[2:]
    result = {"date": f"{datetime.date.today()}", "threads": THREADS}
    try:
        result["versions"] = {name: importlib.metadata.version(name) for name in packages}
        table = methods()
    except ImportError as error:
        out.write_text(json.dumps(result | {"missing": f"{type(error).__name__}: {error}"}))
        return
    package = packages[0].replace("-", "_").replace("_for_pytorch", "")
    result["load"] = os.getloadavg()
    result["probes"], result["works"], result["parameters"] = {}, {}, {}
    for name, build in probes().items():
        if not chosen or name in chosen:
            problem = build()
            found = {key: judged(method, problem, package)[0] for key, method in table.items()}
            result["probes"][name] = found
            for key, row in found.items():
                cell = f"{row.get('error', float('nan')):8.1e} {row.get('says', '')[:60]}"
                print(f"{name:32s} {key:36s} {row['outcome']:8s} {cell}", flush=True)
    for name, build in works().items():
        if not chosen or name in chosen:
            problem = build()
            result["parameters"][name] = problem.parameters()
            result["works"][name] = costs(problem, table, package)
            for key, row in result["works"][name].items():
                cells = [f"{row.get(k, float('nan')):9.2g}" for k in COLUMNS]
                says = row.get("says", "")[:60]
                print(f"{name:32s} {key:36s}" + "".join(cells), says, flush=True)
    result["load_after"] = os.getloadavg()
    out.write_text(json.dumps(result))
