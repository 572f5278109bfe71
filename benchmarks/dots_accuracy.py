"""Claim: value_grad_and_dots agrees with per-row autodiff for every kind of model, to rounding.

python -m benchmarks.dots_accuracy
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._common import save
from ghostjax import conservation_error, testing, value_grad_and_dots
from models.arrays import POSITIONS, ROWS, direction_like
from models.flax import MODELS, SUMMED
from models.functions import FUNCTIONS
from models.layers import LAYERS
from models.libraries import LIBRARIES
from models.modules import CASES, KINDS


def flax_table():
    names = [*KINDS, "remat", "scan_of_remat"]
    return {name: lambda name=name: CASES[name](ROWS, POSITIONS, jnp.float32) for name in names}


def measure(losses, params, batch, reduction):
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[reduction]
    direction = direction_like(params)
    fn = value_grad_and_dots(lambda p, b: reduce(losses(p, b)), loss_reduction=reduction)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
    expected = jax.tree.map(
        lambda rows, vector: np.tensordot(
            np.asarray(rows, np.float64), np.asarray(vector, np.float64), axes=vector.ndim
        ),
        testing.per_example_grads(losses, params, batch),
        direction,
    )
    errors = testing.relative_errors(result.dots, expected)
    certificate = jax.tree.leaves(conservation_error(result, direction))
    return {"dots": max(errors.values()), "certificate": float(max(certificate))}


def main():
    tables = {
        "flax": flax_table() | MODELS,
        "functions": FUNCTIONS | LAYERS,
        "libraries": LIBRARIES,
    }
    results = {}
    for kind, table in tables.items():
        print(f"\n{kind:50s} {'dots':>9s} {'certificate':>12s}")
        results[kind] = {}
        for name, build in table.items():
            errors = measure(*build(), "sum" if name in SUMMED else "mean")
            results[kind][name] = errors
            print(f"{name:50s} {errors['dots']:9.1e} {errors['certificate']:12.1e}", flush=True)
            jax.clear_caches()
    every = [errors for table in results.values() for errors in table.values()]
    assert max(errors["dots"] for errors in every) <= 1e-5
    save("dots_accuracy", results)


if __name__ == "__main__":
    main()
