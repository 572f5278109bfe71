"""dattri-llm at the sizes of ``benchmarks.published``, on a GPU where there is one.

Times over torch's plain step, AdamW included.
"""

import copy
import json
import pathlib
import statistics
import sys
import time

import torch

from benchmarks._peers.dattri_llm import methods
from benchmarks._peers.in_torch import gpt


def main(out, sizes, repeats):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = dict(sizes)
    problem = gpt(sizes.pop("rows"), sizes.pop("val_rows"), tied=True, device=device, **sizes)
    [(name, method)] = methods().items()
    models = {"torch, plain step": copy.deepcopy(problem.model), name: copy.deepcopy(problem.model)}
    steps = {
        "torch, plain step": problem.plain(models["torch, plain step"]),
        name: method.build(problem, models[name]),
    }
    optimizers = {key: torch.optim.AdamW(model.parameters()) for key, model in models.items()}
    samples = {key: [] for key in steps}
    for turn in range(repeats + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            optimizers[key].step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                samples[key].append(time.perf_counter() - start)
    seconds = {key: statistics.median(values) for key, values in samples.items()}
    plain = seconds["torch, plain step"]
    table = {key: {"time": value / plain, "device": device} for key, value in seconds.items()}
    pathlib.Path(out).write_text(json.dumps(table))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
