"""A PyGrain data set as the source: it reads and transforms, the run shuffles and batches.

ghostjax train --task examples.grain_loader:task --steps 64 --out runs/grain
"""

import grain
import jax.numpy as jnp
import numpy as np
import optax

from examples.digits import CLASSES, SIZE, pictures
from ghostjax import Task


def augmented(example: dict, rng: np.random.Generator) -> dict:
    """By PyGrain's own random numbers, which depend on the example's number and the seed alone."""
    return {**example, "x": example["x"] + 0.1 * rng.standard_normal(SIZE**2).astype(np.float32)}


def task() -> Task:
    train = grain.MapDataset.source(pictures(64, seed=0, wrong=True)).seed(5)
    return Task(
        train=train.random_map(augmented),
        val={"clean": grain.MapDataset.source(pictures(32, seed=1))},
        init=lambda seed: {"kernel": jnp.zeros((SIZE**2, CLASSES))},
        row_losses=lambda params, batch: optax.softmax_cross_entropy_with_integer_labels(
            batch["x"] @ params["kernel"], batch["y"]
        ),
        optimizer=optax.sgd(0.1),
        unit="nats",
    )
