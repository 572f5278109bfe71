"""Claim: the engine agrees with per-row autodiff for every kind of module, to rounding.

python -m benchmarks.engine_accuracy
"""

import os

# bfloat16 means the same in two compiled programs only without excess precision.
os.environ["XLA_FLAGS"] = "--xla_allow_excess_precision=false " + os.environ.get("XLA_FLAGS", "")

import jax.numpy as jnp

from benchmarks._common import save
from ghostjax import GradDotProdEngine, testing
from models.modules import CASES

ROWS, VAL_ROWS, POSITIONS = 7, 3, 7


def worst(errors):
    return max(errors.values())


def measure(name):
    result = {}
    oracles = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        loss_fn, params, batch = CASES[name](ROWS, POSITIONS, dtype)
        oracles[dtype] = testing.per_example_dots(loss_fn, params, batch, VAL_ROWS)
        dots = GradDotProdEngine(loss_fn, val_batch_size=VAL_ROWS)(params, batch).dots
        errors = testing.relative_errors(dots, oracles[dtype])
        result[jnp.dtype(dtype).name] = worst(errors)
    in_bfloat16 = {"bfloat16_autodiff": oracles[jnp.bfloat16], "bfloat16_engine": dots}
    for kind, found in in_bfloat16.items():
        errors = testing.relative_errors(found, oracles[jnp.float32])
        result[f"{kind}_to_float32"] = worst(errors)
    return result


def main():
    results = {}
    # The last two: how far bfloat16 autodiff and the bfloat16 engine are from float32 autodiff.
    print(f"{'case':50s} {'float32':>9s} {'bfloat16':>9s} {'autodiff':>9s} {'engine':>9s}")
    for name in CASES:
        results[name] = measure(name)
        print(f"{name:50s} " + " ".join(f"{error:9.1e}" for error in results[name].values()))
    assert max(result["float32"] for result in results.values()) <= 1e-5
    save("engine_accuracy", results)


if __name__ == "__main__":
    main()
