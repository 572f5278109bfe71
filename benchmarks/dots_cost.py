"""Claim: value_grad_and_dots costs one forward-shaped product more than a plain step and a
validation gradient, the floor of any exact method.

The GPT-2 shape, B = V = 8 and B = 16, V = 1. The direction through AdamW is linearised at the
current gradient, for which XLA merges two backward passes. Rivals: forward mode, vmap(grad), and a
scan over rows, of whose FLOPs XLA counts one row only.

    python -m benchmarks.dots_cost
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks._common import compare, run
from benchmarks._models import setup
from ghostjax import directions, testing, value_grad_and_dots

OPTIMIZER = optax.adamw(1e-3)
SHAPES = {"B 8, V 8": (8, 8), "B 16, V 1": (16, 1)}


def inner_products(rows, vector):
    return jax.tree.map(lambda g, v: g.reshape(g.shape[0], -1) @ v.reshape(-1), rows, vector)


def measure(train_rows, val_rows):
    row_losses, params, both = setup(train_rows + val_rows)
    train = jax.tree.map(lambda leaf: leaf[:train_rows], both)
    val = jax.tree.map(lambda leaf: leaf[train_rows:], both)

    def loss_fn(params, batch):
        return row_losses(params, batch).mean()

    def plain(params, train, val):
        return jax.value_and_grad(loss_fn)(params, train)

    def plain_and_validation(params, train, val):
        return plain(params, train, val), jax.grad(loss_fn)(params, val)

    def direction_form(params, train, val):
        direction = jax.grad(loss_fn)(params, val)
        result = value_grad_and_dots(loss_fn)(params, train, direction=direction)
        return (result.value, result.grads), result.total()

    def through_optimizer(params, train, val):
        """At the current gradient: the backward pass is written twice."""
        grads = jax.grad(loss_fn)(params, train)
        direction = directions.through_optimizer(
            OPTIMIZER, OPTIMIZER.init(params), params, grads, jax.grad(loss_fn)(params, val)
        )
        result = value_grad_and_dots(loss_fn)(params, train, direction=direction)
        return (result.value, result.grads), result.total()

    def forward_mode(params, train, val):
        direction = jax.grad(loss_fn)(params, val)
        dots = jax.jvp(lambda p: row_losses(p, train), (params,), (direction,))[1]
        return plain(params, train, val), dots

    def one_row(params, row):
        return loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))

    def mapped(params, train, val):
        direction = jax.grad(loss_fn)(params, val)
        values, rows = jax.vmap(jax.value_and_grad(one_row), in_axes=(None, 0))(params, train)
        dots = sum(jax.tree.leaves(inner_products(rows, direction)))
        return (values.mean(), jax.tree.map(lambda g: g.mean(0), rows)), dots

    def scanned(params, train, val):
        direction = jax.grad(loss_fn)(params, val)

        def step(total, row):
            value, grads = jax.value_and_grad(one_row)(params, row)
            dot = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))
            return jax.tree.map(jnp.add, total, grads), (value, dot)

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, (values, dots) = jax.lax.scan(step, zeros, train)
        return (values.mean(), jax.tree.map(lambda g: g / train_rows, total)), dots

    functions = {
        "plain step": plain,
        "+ validation gradient": plain_and_validation,
        "value_grad_and_dots": direction_form,
        "... through AdamW": through_optimizer,
        "jvp of row losses": forward_mode,
        "vmap(grad)": mapped,
        "scan over rows": scanned,
    }
    args = (params, train, val)

    def check(outputs):
        for name in ("value_grad_and_dots", "jvp of row losses", "scan over rows"):
            testing.assert_dots_close(outputs[name][1], outputs["vmap(grad)"][1])

    return compare({name: (function, args) for name, function in functions.items()}, check)


if __name__ == "__main__":
    run("dots_cost", SHAPES, measure)
