"""An Equinox module, partitioned into its arrays and the rest; the losses combine them.

ghostjax train --task examples.equinox_model:task --learning-rate 0.01 --out runs/equinox
"""

import equinox as eqx
import jax
import optax

from examples.digits import CLASSES, SIZE, pictures
from ghostjax import Task


def model(seed: int) -> eqx.Module:
    return eqx.nn.MLP(SIZE * SIZE, CLASSES, width_size=16, depth=1, key=jax.random.key(seed))


def task() -> Task:
    _, static = eqx.partition(model(0), eqx.is_inexact_array)

    def init(seed):
        return eqx.filter(model(seed), eqx.is_inexact_array)

    def row_losses(params, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    # Without an optimizer: that of the options, adamw by default.
    return Task(
        train=pictures(64, seed=0, wrong=True),
        val={"clean": pictures(32, seed=1)},
        init=init,
        row_losses=row_losses,
        unit="nats",
    )
