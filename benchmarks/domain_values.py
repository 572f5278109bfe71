"""Claim: values tell which domain a validation set is from, for two validation sets in one run.

The default job: prose and code in equal parts, held-out prose and held-out code as validation sets.
ROC AUC of the values for prose (code) above code (prose), by value for validation set prose (code),
and the fidelity of the scores, with validation gradients at the parameters (order 1) and half-way
along the update (order 2). Model and data of the default job were chosen so that the first of these
is high at order 1; order 2, and validation set code, were not.

    python -m benchmarks.domain_values
"""

import pathlib
import tempfile

from benchmarks._common import save
from ghostjax.runs.commands.train import run
from ghostjax.runs.config import TrainConfig

RUNS = ((1, 0), (2, 0), (2, 1))  # order and seed


def measure(order: int, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        summary = run(TrainConfig(out, order=order, seed=seed, quiet=True))
    return {name: summary[name] for name in ("auc", "fidelity", "val_loss", "seconds")}


def main():
    results = {}
    for order, seed in RUNS:
        found = results[f"order {order}, seed {seed}"] = measure(order, seed)
        auc = ", ".join(f"{name} {value:.3f}" for name, value in found["auc"].items())
        errors = ", ".join(f"{own['prediction_error']:.1%}" for own in found["fidelity"].values())
        print(f"order {order}, seed {seed}: AUC {auc}; prediction error {errors}", flush=True)
    save("domain_values", results)


if __name__ == "__main__":
    main()
