"""What every benchmark needs: figures of a compiled function, ratios of times, a result file."""

import datetime
import json
import pathlib
import platform
import statistics
import time
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def figures(function, *args) -> dict[str, Any]:
    """XLA's own FLOPs and scratch memory, the time to compile, and the compiled function."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return {
        "gflop": compiled.cost_analysis()["flops"] / 1e9,
        "scratch_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "trace_s": traced - start,
        "compile_s": time.perf_counter() - traced,
        "compiled": compiled,
    }


def times(
    functions: dict[str, Any], args: dict[str, tuple], repeats: int, *, twice: bool = False
) -> dict[str, float]:
    """Median seconds per call; the functions take turns, so that a slow spell hits all alike.

    ``twice``: each turn is two calls, of which the second counts, so that nobody pays for the
    caches and pages that the one before has emptied.
    """
    samples = {name: [] for name in functions}
    for name, function in functions.items():
        jax.block_until_ready(function(*args[name]))
    for _ in range(repeats):
        for name, function in functions.items():
            if twice:
                jax.block_until_ready(function(*args[name]))
            start = time.perf_counter()
            jax.block_until_ready(function(*args[name]))
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def compare(functions: dict[str, tuple[Any, tuple]], check: Any) -> dict[str, dict[str, float]]:
    """Figures and times (relative to the first and to the second) of ``name -> (function, args)``.

    ``check(outputs)`` gets all outputs by name, before anything is timed.
    """
    table = {name: figures(function, *args) for name, (function, args) in functions.items()}
    compiled = {name: row.pop("compiled") for name, row in table.items()}
    args = {name: args for name, (_, args) in functions.items()}
    check({name: function(*args[name]) for name, function in compiled.items()})
    seconds = times(compiled, args, repeats=5)
    first, floor = [seconds[name] for name in list(functions)[:2]]
    for name, row in table.items():
        row["time"] = seconds[name] / first
        row["over_floor"] = seconds[name] / floor
    return table


def run(name: str, shapes: dict[str, tuple], measure: Any) -> None:
    """Measures every shape, prints the tables and saves them; other shapes' results stay."""
    results = {}
    for shape, sizes in shapes.items():
        results[shape] = measure(*sizes)
        heads = ("GFLOP", "MiB", "trace s", "compile s", "time", "over floor")
        print(f"\n{shape:22s}" + "".join(f"{head:>11s}" for head in heads))
        for label, row in results[shape].items():
            figures = ("gflop", "scratch_mib", "trace_s", "compile_s", "time", "over_floor")
            print(f"{label:22s}" + "".join(f"{row[name]:11.2f}" for name in figures))
        results[shape] = {"date": f"{datetime.date.today()}", **results[shape]}
    save(name, results, keep=True)


def save(name: str, result: Any, keep: bool = False) -> None:
    """Writes ``results/<name>.json`` with the versions that were run.

    ``keep``: of a dict, what was there by other names stays.
    """
    environment = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    if keep and path.exists():
        result = json.loads(path.read_text())["result"] | result
    path.write_text(json.dumps({"environment": environment, "result": result}, indent=1) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
