"""Claim: clipped gradients of rows cost about two plain steps, and little memory.

The GPT-2 shape, and a network of convolutions. Rivals: jax_privacy, all rows at once and one after
another, and optax's aggregation (without noise) of vmap(grad). Half of the rows are clipped. XLA
counts the FLOPs of one round of a loop only; times are ratios of runs that take turns.

    python -m benchmarks.clipping [rows of the table ...]
"""

import datetime
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy.clipping import clipped_grad

from benchmarks._common import figures, save, times
from benchmarks._peers.harness import largest_error
from ghostjax import squared_norms, value_and_clipped_grad
from models.measured import cnn, mlp, setup

SHAPES = {
    "GPT-2 shape, B 16": (setup, 16, {}),
    "GPT-2 shape, B 64": (setup, 64, {}),
    "GPT-2 shape, B 256": (setup, 256, {}),
    "GPT-2 shape, 6 layers, scan+remat, B 16": (setup, 16, {"layers": 6, "stacked": "scan+remat"}),
    "GPT-2 shape, T 16, B 128": (setup, 128, {"positions": 16}),
    "MLP, B 256": (mlp, 256, {}),
    "CNN, B 16": (cnn, 16, {}),
    "CNN, B 64": (cnn, 64, {}),
    "CNN, B 256": (cnn, 256, {}),
}


def measure(build, rows, options):
    row_losses, params, batch = build(rows, **options)
    norms = jax.jit(squared_norms(row_losses))(params, batch)
    max_norm = float(np.median(np.sqrt(sum(jax.tree.leaves(norms)))))

    def loss_fn(params, batch):
        return jnp.sum(row_losses(params, batch))

    def one_row(params, row):
        return loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))

    def plain(params, batch):
        return jax.value_and_grad(loss_fn)(params, batch)[1]

    def ours(params, batch):
        fn = value_and_clipped_grad(loss_fn, max_norm, loss_reduction="sum")
        return fn(params, batch)[1]

    def aggregated(params, batch):
        by_row = jax.vmap(jax.grad(one_row), in_axes=(None, 0))(params, batch)
        transform = optax.contrib.differentially_private_aggregate(max_norm, 0.0, 0)
        mean = transform.update(by_row, transform.init(params))[0]
        return jax.tree.map(lambda leaf: leaf * rows, mean)

    functions = {
        "plain step": plain,
        "value_and_clipped_grad": ours,
        "jax_privacy": clipped_grad(loss_fn, l2_clip_norm=max_norm),
        "jax_privacy, row by row": clipped_grad(loss_fn, l2_clip_norm=max_norm, microbatch_size=1),
        "optax of vmap(grad)": aggregated,
    }
    table = {name: figures(function, params, batch) for name, function in functions.items()}
    compiled = {name: row.pop("compiled") for name, row in table.items()}
    expected = clipped_in_float64(loss_fn, params, batch, max_norm)
    for name, function in compiled.items():
        if name != "plain step":
            found = function(params, batch)
            error = largest_error(jax.tree.leaves(found), jax.tree.leaves(expected))
            assert error < 1e-5, (name, error)
            table[name]["error"] = error
    is_long = table["plain step"]["gflop"] > 500  # seconds, beside which caches say little
    args = dict.fromkeys(compiled, (params, batch))
    seconds = times(compiled, args, repeats=3 if is_long else 5, twice=not is_long)
    for name, row in table.items():
        row["time"] = seconds[name] / seconds["plain step"]
        row["memory"] = row["scratch_mib"] / table["plain step"]["scratch_mib"]
    return table


def clipped_in_float64(loss_fn, params, batch, max_norm):
    """Every row's gradient by itself, clipped and added up by NumPy."""
    grad, total = jax.jit(jax.grad(loss_fn)), None
    for row in range(jax.tree.leaves(batch)[0].shape[0]):
        own = grad(params, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch))
        own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), own)
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(own)))
        own = jax.tree.map(lambda leaf, norm=norm: leaf * min(1, max_norm / norm), own)
        total = own if total is None else jax.tree.map(np.add, total, own)
    return total


if __name__ == "__main__":
    results = {}
    columns = {
        "error": "9.1e",
        "gflop": "9.1f",
        "scratch_mib": "11.1f",
        "memory": "9.2f",
        "time": "9.2f",
    }
    for shape in sys.argv[1:] or SHAPES:
        table = measure(*SHAPES[shape])
        print(f"\n{shape:26s}" + "".join(f"{name:>11s}" for name in columns))
        for label, row in table.items():
            cells = [format(row.get(name, 0), spec) for name, spec in columns.items()]
            print(f"{label:26s}" + "".join(f"{cell:>11s}" for cell in cells), flush=True)
        results[shape] = {"date": f"{datetime.date.today()}", **table}
        save("clipping", results, keep=True)
