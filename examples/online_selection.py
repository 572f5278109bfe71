"""Online selection: of 32 candidate rows, a quarter with wrong labels, each step trains on 8.

    python -m examples.online_selection --steps 60

Compared with rows at random, by the same optimizer and as many steps.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.digits import CLASSES, pictures
from ghostjax import selection

CANDIDATES, KEPT = 32, 8


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.LayerNorm()(nn.relu(nn.Dense(32)(x))))


def stacked(examples):
    return {key: jnp.asarray(np.stack([row[key] for row in examples])) for key in ("x", "y")}


def main(steps: int = 60, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    train = stacked(pictures(256, seed=seed))
    is_wrong = rng.random(256) < 0.25
    train["y"] = jnp.where(is_wrong, (train["y"] + 1) % CLASSES, train["y"])
    val, test = stacked(pictures(16, seed=seed + 1)), stacked(pictures(256, seed=seed + 2))
    model, optimizer = Model(), optax.adam(3e-3)

    def row_losses(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    batches = [rng.choice(256, CANDIDATES, replace=False) for _ in range(steps)]
    found = {}
    for name in ("by_score", "at_random"):
        policy = getattr(selection, name)
        step = selection.select_step(row_losses, optimizer, KEPT, policy, exclude=["Dense_1/*"])
        params = model.init(jax.random.key(seed), train["x"][:1])["params"]
        state, wrong, kept = optimizer.init(params), 0, 0
        for number, ids in enumerate(batches):
            candidates = {key: array[ids] for key, array in train.items()}
            more = {"key": jax.random.key(number)} if name == "at_random" else {}
            params, state, selected = step(params, state, candidates, val, **more)
            rows = np.asarray(selected.rows)
            wrong, kept = wrong + is_wrong[ids[rows[rows >= 0]]].sum(), kept + (rows >= 0).sum()
        found[f"wrong_{name}"] = float(wrong / kept)
        found[f"test_loss_{name}"] = float(row_losses(params, test).mean())
    return found


if __name__ == "__main__":
    import tyro

    print(tyro.cli(main))
