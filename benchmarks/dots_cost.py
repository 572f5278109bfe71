"""Claim: dots cost little over a plain step and a validation gradient, the floor of any exact one.

The GPT-2 shape. Rivals: forward mode, vmap(grad), optax's micro_grad with a metric per row, and a
scan over rows; of what loops, XLA counts one round's FLOPs only. "late, AdamW": at the current
gradient, by ``value_and_dots_fn``, clipped by the global norm first.

    python -m benchmarks.dots_cost [rows of the table ...]
"""

import sys

import jax
import jax.numpy as jnp
import optax
from optax.microbatching import micro_grad

from benchmarks._common import compare, run
from ghostjax import directions, testing, value_and_dots_fn, value_grad_and_dots
from models.measured import setup

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
K = 6
SHAPES = {
    "B 8, V 8": (8, 8, {}),
    "B 16, V 1": (16, 1, {}),
    "B 4, V 1, T 1024, 2 layers": (4, 1, {"layers": 2, "positions": 1024}),
    "B 8, V 8, 6 layers, scan": (8, 8, {"layers": 6, "stacked": "scan"}),
    "B 8, V 8, 6 layers, scan+remat": (8, 8, {"layers": 6, "stacked": "scan+remat"}),
    "B 8, V 8, 12 layers": (8, 8, {"layers": 12}),
}


def inner_products(rows, vector):
    return jax.tree.map(lambda g, v: g.reshape(g.shape[0], -1) @ v.reshape(-1), rows, vector)


def measure(train_rows, val_rows, shape):
    row_losses, params, both = setup(train_rows + val_rows, **shape)
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

    def several(params, train, val):
        """K directions; the first is the validation gradient."""
        direction = jax.tree.map(
            lambda leaf: jnp.stack([leaf / k for k in range(1, K + 1)]),
            jax.grad(loss_fn)(params, val),
        )
        result = value_grad_and_dots(loss_fn)(params, train, direction=direction)
        dots = jax.tree.leaves(result.dots)
        return (result.value, result.grads), sum(leaf[0] for leaf in dots), dots

    def late(params, train, val):
        value, grads, dots = value_and_dots_fn(loss_fn)(params, train)
        return (value, grads), sum(jax.tree.leaves(dots(jax.grad(loss_fn)(params, val))))

    def late_through_optimizer(params, train, val):
        value, grads, dots = value_and_dots_fn(loss_fn)(params, train)
        direction = directions.through_optimizer(
            OPTIMIZER, OPTIMIZER.init(params), params, grads, jax.grad(loss_fn)(params, val)
        )
        return (value, grads), sum(jax.tree.leaves(dots(direction)))

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

    def micro(params, train, val):
        direction = jax.grad(loss_fn)(params, val)

        def dot(grads):
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))

        fn = micro_grad(loss_fn, microbatch_size=1, metrics_fn=dot)
        total, aux = fn(params, train)
        grads = jax.tree.map(lambda g: g / train_rows, total)
        return (aux.values.mean(), grads), aux.metrics

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
        f"... K = {K} directions": several,
        "late direction": late,
        "late, AdamW, clipping": late_through_optimizer,
        "jvp of row losses": forward_mode,
        "vmap(grad)": mapped,
        "micro_grad": micro,
        "scan over rows": scanned,
    }
    if shape.get("layers", 4) > 4:  # per-row gradients of all layers take too much memory and time
        del functions["vmap(grad)"]
    args = (params, train, val)

    def check(outputs):
        reference = outputs["scan over rows"]
        for name, (_, *rest) in outputs.items():
            if name not in ("plain step", "+ validation gradient", "late, AdamW, clipping"):
                testing.assert_dots_close(rest[0], reference[1])

    return compare({name: (function, args) for name, function in functions.items()}, check)


if __name__ == "__main__":
    chosen = sys.argv[1:] or SHAPES
    run("dots_cost", {name: SHAPES[name] for name in chosen}, measure)
