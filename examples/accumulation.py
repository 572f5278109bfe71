"""Gradient accumulation by ``optax.MultiSteps``: every second step updates, and is scored.

A row of a step that only gathers has no effect until a later step, so the run refuses to score it:

    ghostjax train --task examples.accumulation:task --score-every 2 --out runs/accumulation

To score all rows, take ``--batch-size 32 --microbatches 2`` in the place of ``MultiSteps``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from examples.digits import CLASSES, SIZE, pictures
from ghostjax import Task

EVERY = 2


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(16)(x)))


def task() -> Task:
    def init(seed):
        return Model().init(jax.random.key(seed), jnp.zeros((1, SIZE * SIZE)))["params"]

    def row_losses(params, batch):
        logits = Model().apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return Task(
        train=pictures(64, seed=0, wrong=True),
        val={"clean": pictures(32, seed=1)},
        init=init,
        row_losses=row_losses,
        optimizer=optax.MultiSteps(optax.adam(1e-2), every_k_schedule=EVERY),
        unit="nats",
    )
