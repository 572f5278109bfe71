"""A Flax NNX model: its parameters are split off, the rest is put back inside the losses.

ghostjax train --task examples.nnx_model:task --steps 64 --out runs/nnx
"""

import optax
from flax import nnx

from examples.digits import CLASSES, SIZE, pictures
from ghostjax import Task


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(SIZE * SIZE, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(nnx.relu(self.dense(x))))


def task() -> Task:
    graphdef, _, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def init(seed):
        return nnx.state(Model(nnx.Rngs(seed)), nnx.Param)

    def row_losses(params, batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])

    return Task(
        train=pictures(64, seed=0, wrong=True),
        val={"clean": pictures(32, seed=1)},
        init=init,
        row_losses=row_losses,
        optimizer=optax.adam(1e-2),
        unit="nats",
    )
