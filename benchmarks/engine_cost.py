"""Claim: the engine costs one forward-shaped product more than a plain step of all N rows.

A GPT-2-shaped model with a tied head. Rivals: a plain step, and per-row gradients by vmap(grad).

    python -m benchmarks.engine_cost
"""

import jax
import jax.numpy as jnp

from benchmarks._common import compare, run
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

    def check(outputs):
        testing.assert_dots_close(outputs["engine"].dots, jax.device_get(outputs["vmap(grad)"]))

    return compare(functions, check)


if __name__ == "__main__":
    run("engine_cost", SHAPES, measure)
