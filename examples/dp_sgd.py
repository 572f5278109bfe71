"""DP-SGD: batches drawn at random, gradients clipped row by row without being written out, noise.

    python -m examples.dp_sgd --steps 60

How private that is follows from the noise, the rate and the number of steps: ask dp_accounting,

    dp_accounting.rdp.RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(
        rate, dp_accounting.GaussianDpEvent(noise_multiplier)), steps).get_epsilon(1e-5)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.digits import CLASSES, SIZE, pictures
from ghostjax import value_and_clipped_grad


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x.reshape(-1, SIZE, SIZE, 1)))
        x = nn.GroupNorm(2)(x)  # BatchNorm would let rows see each other
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def stacked(examples):
    return {key: jnp.asarray(np.stack([row[key] for row in examples])) for key in ("x", "y")}


def main(
    steps: int = 60,
    rate: float = 0.05,
    max_norm: float = 1.0,
    noise_multiplier: float = 0.6,
    seed: int = 0,
) -> dict[str, float]:
    train, test = stacked(pictures(1024, seed=seed)), stacked(pictures(256, seed=seed + 1))
    count, room = len(train["y"]), 96  # a batch is padded to this many rows
    model, optimizer = Model(), optax.adam(1e-2)
    params = model.init(jax.random.key(seed), train["x"][:1])["params"]

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).sum()

    @jax.jit
    def step(params, state, key):
        drawn, key = jax.random.split(key)
        is_in = jax.random.bernoulli(drawn, rate, (count,))
        ids = jnp.nonzero(is_in, size=room, fill_value=0)[0]
        weights = (jnp.arange(room) < is_in.sum()).astype(jnp.float32)
        batch = {name: array[ids] for name, array in train.items()}
        clipped = value_and_clipped_grad(loss_fn, max_norm, weights=weights, loss_reduction="sum")
        _, grads = clipped(params, batch)  # a sum, to which no row adds more than max_norm
        noise = optax.tree.random_like(key, grads)
        grads = jax.tree.map(lambda g, n: g + noise_multiplier * max_norm * n, grads, noise)
        grads = jax.tree.map(lambda g: g / (rate * count), grads)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, is_in.sum()

    state, largest = optimizer.init(params), 0
    for key in jax.random.split(jax.random.key(seed + 1), steps):
        params, state, size = step(params, state, key)
        largest = max(largest, int(size))
    if largest > room:
        raise ValueError(f"a batch of {largest} rows has no room in {room}: rows were left out")
    right = jnp.argmax(model.apply({"params": params}, test["x"]), -1) == test["y"]
    return {"accuracy": float(right.mean()), "largest_batch": float(largest)}


if __name__ == "__main__":
    import tyro

    print(tyro.cli(main))
