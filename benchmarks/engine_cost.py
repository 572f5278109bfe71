"""Claim: the engine costs one forward-shaped product more than a plain step of all N rows.

A GPT-2-shaped model with a tied head. Rivals: a plain step, and per-row gradients by vmap(grad).

    python -m benchmarks.engine_cost
"""

import jax
import jax.numpy as jnp

from benchmarks._common import figures, save, times
from benchmarks._models import setup
from ghostjax import GradDotProdEngine, testing

SHAPES = {"B 8, V 8": (8, 8), "B 16, V 2": (16, 2)}


def measure(train_rows, val_rows):
    loss_fn, params, batch = setup(train_rows + val_rows)
    engine = GradDotProdEngine(loss_fn, val_batch_size=val_rows)
    train = jax.tree.map(lambda leaf: leaf[:train_rows], batch)

    def mean_loss(params, batch):
        return loss_fn(params, batch).mean()

    def per_row(params, batch):
        def one(row):
            return jax.grad(mean_loss)(params, jax.tree.map(lambda leaf: leaf[None], row))

        rows = jax.vmap(one)(batch)
        total = jax.tree.map(lambda g: g[train_rows:].mean(0), rows)
        return jax.tree.map(
            lambda g, v: jnp.einsum("bf,f->b", g[:train_rows].reshape(train_rows, -1), v.ravel()),
            rows,
            total,
        )

    functions = {
        "plain step, B rows": (jax.value_and_grad(mean_loss), (params, train)),
        "plain step, N rows": (jax.value_and_grad(mean_loss), (params, batch)),
        "engine": (engine, (params, batch)),
        "vmap(grad)": (per_row, (params, batch)),
    }
    table = {name: figures(function, *args) for name, (function, args) in functions.items()}
    compiled = {name: row.pop("compiled") for name, row in table.items()}
    args = {name: args for name, (_, args) in functions.items()}
    testing.assert_dots_close(
        compiled["engine"](params, batch).dots,
        jax.device_get(compiled["vmap(grad)"](params, batch)),
    )
    seconds = times(compiled, args, repeats=5)
    for name, row in table.items():
        row["time"] = seconds[name] / seconds["plain step, B rows"]
    return table


def main():
    results = {}
    for shape, sizes in SHAPES.items():
        results[shape] = measure(*sizes)
        print(f"\n{shape:22s} {'GFLOP':>8s} {'MiB':>8s} {'compile s':>10s} {'time':>6s}")
        for name, row in results[shape].items():
            print(
                f"{name:22s} {row['gflop']:8.2f} {row['scratch_mib']:8.0f} "
                f"{row['compile_s']:10.1f} {row['time']:6.2f}"
            )
    save("engine_cost", results)


if __name__ == "__main__":
    main()
