"""What every benchmark needs: figures of a compiled function, ratios of times, a result file."""

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
    lowered = jax.jit(function).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    return {
        "gflop": compiled.cost_analysis()["flops"] / 1e9,
        "scratch_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "compile_s": time.perf_counter() - start,
        "compiled": compiled,
    }


def times(functions: dict[str, Any], args: dict[str, tuple], repeats: int) -> dict[str, float]:
    """Median seconds per call; the functions take turns, so that a slow spell hits all alike."""
    samples = {name: [] for name in functions}
    for name, function in functions.items():
        jax.block_until_ready(function(*args[name]))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args[name]))
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def save(name: str, result: Any) -> None:
    """Writes ``results/<name>.json`` with the versions that were run."""
    environment = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment, "result": result}, indent=1) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
