"""Claim: to find wrong labels, take the per-example loss, not in-run values.

python -m benchmarks.mislabels

Digits with 10% or 40% wrong labels, trained on all rows; ROC AUC for telling wrong labels from
right ones, mean over five seeds and standard deviation. A figure of a row is averaged over its
visits during training, each in the state in which that step found the network; "final": of the
trained network alone. In-run values are sums of scores (``InRunValues``), through the optimizer at
the previous gradient, or of plain gradients. Cosine and values are with the gradient of 64 clean
rows; loss and norm need no clean rows.

Two lengths: 5 epochs, and 30, in which the network learns many wrong labels by heart.

The loss averaged over visits is at or near the top everywhere, costs nothing and needs no clean
labels: use that. A value answers another question, how much a row changed the loss of these 64
rows, and a row with a right label may well have hurt them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._common import save
from benchmarks._digits import batches, draw, init, mean_loss, roc_auc_score, row_losses
from ghostjax import directions, value_grad_and_dots
from ghostjax.values import InRunValues

SEEDS, BATCH, VAL_ROWS = 5, 64, 64
SHARES, EPOCHS = (0.1, 0.4), (5, 30)
OPTIMIZERS = {"SGD 0.1": optax.sgd(0.1), "AdamW 1e-3": optax.adamw(1e-3)}
FIGURES = (
    "loss, mean of visits",
    "loss, final",
    "gradient norm, mean of visits",
    "gradient norm, final",
    "cosine, mean of visits",
    "cosine, final",
    "in-run value",
    "in-run value, plain gradients",
)
ADDED = ("loss", "gradient norm", "cosine", "value", "value, plain gradients")


def row_figures(params, rows, val_grads):
    """Loss, gradient norm and cosine with the validation gradient of every row, by autodiff."""

    def one(row):
        loss, grads = jax.value_and_grad(row_losses)(params, row)
        norm = optax.global_norm(grads)
        cosine = optax.tree.vdot(grads, val_grads) / (norm * optax.global_norm(val_grads) + 1e-30)
        return loss, norm, -cosine

    return jax.vmap(one)(rows)


def run(tx, data, places, seed):
    """{figure: [train rows]}, larger for rows that look wrong."""

    def step(carry, places):
        params, state, last, added = carry
        batch = data.train[places]
        val_grads = jax.grad(mean_loss)(params, data.val)
        direction = directions.through_optimizer(tx, state, params, last, val_grads)
        result = value_grad_and_dots(mean_loss)(params, batch, direction=direction)
        plain = value_grad_and_dots(mean_loss)(params, batch, direction=val_grads)
        scores = -result.total() / BATCH, -plain.total() / BATCH
        added = added.add(
            places, jnp.stack([*row_figures(params, batch, val_grads), *scores], axis=1)
        )
        updates, state = tx.update(result.grads, state, params)
        return (optax.apply_updates(params, updates), state, result.grads, added), None

    params = init(seed)
    first = jax.grad(mean_loss)(params, data.train[places[0]])
    values = InRunValues.zeros(data.train.labels.shape[0], ADDED)
    carry = params, tx.init(params), first, values
    (params, _, _, added), _ = jax.lax.scan(step, carry, places)
    val_grads = jax.grad(mean_loss)(params, data.val)
    final = row_figures(params, data.train, val_grads)
    visits = jnp.maximum(added.visits, 1)
    return {
        "loss, mean of visits": added.of("loss") / visits,
        "loss, final": final[0],
        "gradient norm, mean of visits": added.of("gradient norm") / visits,
        "gradient norm, final": final[1],
        "cosine, mean of visits": added.of("cosine") / visits,
        "cosine, final": final[2],
        "in-run value": added.of("value"),
        "in-run value, plain gradients": added.of("value, plain gradients"),
    }


def measure(tx, share, epochs):
    compiled = jax.jit(lambda *args: run(tx, *args))
    found = {name: [] for name in FIGURES}
    for seed in range(SEEDS):
        data = draw(seed, VAL_ROWS, share)
        rows = len(data.is_wrong)
        places = batches(seed, rows, BATCH, epochs * (rows // BATCH))
        for name, figure in compiled(data, places, seed).items():
            found[name].append(roc_auc_score(data.is_wrong, np.asarray(figure)))
    return {
        name: {"auc": float(np.mean(aucs)), "std": float(np.std(aucs, ddof=1))}
        for name, aucs in found.items()
    }


def main():
    results = {}
    for optimizer, tx in OPTIMIZERS.items():
        tables = {
            f"{share:.0%}, {epochs} epochs": measure(tx, share, epochs)
            for share in SHARES
            for epochs in EPOCHS
        }
        results[optimizer] = tables
        print(f"\n{optimizer:32s}" + " ".join(f"{label:>16s}" for label in tables))
        for name in next(iter(tables.values())):
            cells = ["{auc:.3f} ({std:.3f})".format(**table[name]) for table in tables.values()]
            print(f"{name:32s}" + " ".join(f"{cell:>16s}" for cell in cells), flush=True)
    save("mislabels", results)


if __name__ == "__main__":
    main()
