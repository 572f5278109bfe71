"""Claim: the engine costs little over a plain step and a validation gradient.

The GPT-2 shape, and a network with LayerNorms on single positions, where products over pairs of
rows are cheapest. Rivals: `jax.jvp` of the row losses, and per-row gradients by vmap(grad).

    python -m benchmarks.engine_cost
"""

import jax
import jax.numpy as jnp

from benchmarks._common import compare, run
from ghostjax import GradDotProdEngine, testing
from models.measured import mlp, setup

SHAPES = {
    "B 8, V 8": (setup, 8, 8),
    "B 16, V 2": (setup, 16, 2),
    "MLP, B 64, V 64": (mlp, 64, 64),
}


def measure(model, train_rows, val_rows):
    loss_fn, params, batch = model(train_rows + val_rows)
    engine = GradDotProdEngine(loss_fn, val_batch_size=val_rows)
    train = jax.tree.map(lambda leaf: leaf[:train_rows], batch)
    val = jax.tree.map(lambda leaf: leaf[train_rows:], batch)

    def mean_loss(params, batch):
        return loss_fn(params, batch).mean()

    def plain(params, train, val):
        return jax.value_and_grad(mean_loss)(params, train)

    def plain_and_validation(params, train, val):
        return plain(params, train, val), jax.grad(mean_loss)(params, val)

    def forward_mode(params, train, val):
        direction = jax.grad(mean_loss)(params, val)
        dots = jax.jvp(lambda p: loss_fn(p, train), (params,), (direction,))[1]
        return plain(params, train, val), dots

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
        "plain step": (plain, (params, train, val)),
        "+ validation gradient": (plain_and_validation, (params, train, val)),
        "plain step, N rows": (jax.value_and_grad(mean_loss), (params, batch)),
        "engine": (engine, (params, batch)),
        "jvp of row losses": (forward_mode, (params, train, val)),
        "vmap(grad)": (per_row, (params, batch)),
    }

    def check(outputs):
        expected = jax.device_get(outputs["vmap(grad)"])
        testing.assert_dots_close(outputs["engine"].dots, expected)
        total = sum(jax.tree.leaves(expected))
        testing.assert_dots_close(outputs["jvp of row losses"][1], total)

    return compare(functions, check)


if __name__ == "__main__":
    run("engine_cost", SHAPES, measure)
