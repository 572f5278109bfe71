"""Claim: scores through the optimizer are what leaving a row out of an update really changes.

python -m benchmarks.ground_truth

Actual effect of row i on a step: the mean validation loss after the optimizer was applied without
row i, minus that after it was applied with all B rows; positive helps. "Without" takes the row's
share out of the gradient, whose other rows keep their weight 1/B ("share"); the same with the other
rows' weight raised to 1/(B-1) is in the second table ("mean of the others"). Effects are computed
in float64 from the state of a float32 run, so that their own rounding plays no part.

Pearson correlation over the rows of a batch, between score and actual effect, one number per step;
median and 10% quantile over the steps of all seeds. The first step is left out: what Adam does in
it is the sign of the gradient, and the derivative is rounding.

Pearson is blind to the size of scores, so the table has the slope, too: how much the actual effect
grows with the score (least squares), median over steps. 1 is perfect. "Loss rose" is the share of
steps after which the validation loss was higher than before.

Scores at the current gradient write the training rows' backward pass twice in one step, and XLA
makes one of it (benchmarks/dots_cost.py). The previous gradient and update are for those who cannot
have that: loops and rematerialised models, where it would be a second pass.

First order breaks down with SGD 0.1: its steps overshoot, so that rows which pull along the
validation gradient hurt in truth. It shows in the validation loss, which rises every other step.
What helps is a smaller step, or the validation gradient further along the current update: at its
midpoint and, for leaving out one row of it, more so at its end. With clipping, the derivative
depends on the direction of the current gradient, which the previous one does not tell.
"""

import os

os.environ["JAX_ENABLE_X64"] = "1"  # the run itself is in float32

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._common import save
from benchmarks._digits import batches, draw, init, mean_loss, row_losses, stack
from ghostjax import directions, value_grad_and_dots

SEEDS, STEPS, BATCH, VAL_ROWS = 3, 150, 32, 64

OPTIMIZERS = {
    "SGD 0.01": (0.01, optax.sgd(0.01)),
    "SGD 0.1": (0.1, optax.sgd(0.1)),
    "AdamW 1e-3": (1e-3, optax.adamw(1e-3)),
    "AdamW 1e-3, clipped": (1e-3, optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3))),
}
SCORES = (
    "plain",
    "optimizer, previous gradient",
    "optimizer, previous gradient, look-ahead by previous update",
    "optimizer, previous gradient, midpoint of previous update",
    "optimizer, current gradient",
    "optimizer, current gradient, midpoint",
    "optimizer, current gradient, look-ahead",
)


def add(tree, other):
    return jax.tree.map(jnp.add, tree, other)


def wide(tree):
    """Floating-point leaves in float64."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree
    )


def all_directions(tx, learning_rate, state, params, grads, last, val):
    """The directions by name. ``last``: gradient and update of the step before."""
    updates, _ = tx.update(grads, state, params)
    val_grads = jax.grad(mean_loss)(params, val)

    def through(grads, val_grads):
        return directions.through_optimizer(tx, state, params, grads, val_grads)

    def ahead(updates):
        return directions.look_ahead(mean_loss, params, updates, val)

    def half_way(updates):
        return directions.midpoint(mean_loss, params, updates, val)

    found = [
        jax.tree.map(lambda leaf: learning_rate * leaf, val_grads),
        through(last["grads"], val_grads),
        through(last["grads"], ahead(last["updates"])),
        through(last["grads"], half_way(last["updates"])),
        through(grads, val_grads),
        through(grads, half_way(updates)),
        through(grads, ahead(updates)),
    ]
    return dict(zip(SCORES, found, strict=True))


def effects(tx, state, params, batch, val):
    """Effects of the rows by the two meanings of "without", [2, B], and of the whole step."""
    state, params, batch, val = wide((state, params, batch, val))
    grads_of_rows = jax.vmap(jax.grad(lambda params, row: row_losses(params, row)), (None, 0))(
        params, batch
    )
    total = jax.tree.map(lambda leaf: leaf.sum(0), grads_of_rows)

    def loss_after(grads):
        updates, _ = tx.update(grads, state, params)
        return mean_loss(add(params, updates), val)

    def without(row, others):
        return loss_after(jax.tree.map(lambda all_rows, own: (all_rows - own) / others, total, row))

    with_all = loss_after(jax.tree.map(lambda leaf: leaf / BATCH, total))
    of_rows = [
        jax.vmap(without, (0, None))(grads_of_rows, others) - with_all
        for others in (float(BATCH), float(BATCH - 1))
    ]
    return jnp.stack(of_rows), mean_loss(params, val) - with_all


def compare(scores, effect):
    """Pearson and slope over rows."""
    scores, effect = scores - scores.mean(), effect - effect.mean()
    product = jnp.sum(scores * effect)
    return {
        "pearson": product / jnp.sqrt(jnp.sum(scores**2) * jnp.sum(effect**2)),
        "slope": product / jnp.sum(scores**2),
    }


def run(tx, learning_rate, seed, data, places):
    """One training run: for every step but the first, both figures of every score."""
    val = data.val

    def step(carry, places):
        params, state, last = carry
        batch = data.train[places]
        grads = jax.grad(mean_loss)(params, batch)
        found = all_directions(tx, learning_rate, state, params, grads, last, val)

        def score(direction):
            result = value_grad_and_dots(mean_loss)(params, batch, direction=direction)
            return result.total() / BATCH

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found.values())
        scores = wide(jax.vmap(score)(stacked))
        actual, of_step = effects(tx, state, params, batch, val)
        figures = jax.vmap(jax.vmap(compare, (None, 0)), (0, None))(scores, actual)
        figures["rose"] = of_step < 0
        updates, state = tx.update(grads, state, params)
        return (add(params, updates), state, {"grads": grads, "updates": updates}), figures

    params = init(seed)
    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = params, tx.init(params), {"grads": zeros, "updates": zeros}
    _, figures = jax.lax.scan(step, carry, places)
    return jax.tree.map(lambda leaf: leaf[1:], figures)


def measure(tx, learning_rate):
    data = stack([draw(seed, VAL_ROWS) for seed in range(SEEDS)])
    rows = data.train.labels.shape[1]
    places = stack([batches(seed, rows, BATCH, STEPS) for seed in range(SEEDS)])
    figures = jax.jit(jax.vmap(lambda *args: run(tx, learning_rate, *args)))(
        np.arange(SEEDS), data, places
    )
    # [seeds, steps, scores, meanings of "without"]
    pearson, slope = (np.asarray(figures[name]) for name in ("pearson", "slope"))
    assert np.isfinite(pearson).all()
    result = {"loss rose": float(np.mean(figures["rose"]))}
    for number, name in enumerate(SCORES):
        result[name] = {}
        for meaning, kind in enumerate(("share", "mean of the others")):
            of_steps = pearson[:, :, number, meaning].ravel()
            result[name][kind] = {
                "pearson median": float(np.median(of_steps)),
                "pearson 10%": float(np.quantile(of_steps, 0.1)),
                "slope median": float(np.median(slope[:, :, number, meaning])),
            }
    return result


def main():
    results = {name: measure(tx, rate) for name, (rate, tx) in OPTIMIZERS.items()}
    for name, result in results.items():
        print(f"{name}: the validation loss rose in {result['loss rose']:.0%} of steps")
    for kind in ("share", "mean of the others"):
        print(f"\nleaving out: {kind}; Pearson median (10% quantile) slope")
        print(f"{'score':62s} " + " ".join(f"{name:>20s}" for name in results))
        for name in SCORES:
            cells = [
                "{pearson median:.3f} ({pearson 10%:.2f}) {slope median:6.2f}".format(
                    **results[optimizer][name][kind]
                )
                for optimizer in results
            ]
            print(f"{name:62s} " + " ".join(f"{cell:>20s}" for cell in cells))
    save("ground_truth", results)


if __name__ == "__main__":
    main()
