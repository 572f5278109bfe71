"""What the table of Flax modules is made of.

A case builds ``(loss_fn, params, batch)`` for N rows, T positions and a compute dtype. Losses are
one number per row, averaged over positions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

FEATURES = 8
VOCAB = 11
CASES: dict[str, Callable] = {}


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


def ids(rows, positions, salt=0):
    return np.random.default_rng(100 + salt).integers(0, VOCAB, (rows, positions), np.int32)


def activations(*shape):
    return np.random.default_rng(200).normal(size=shape).astype(np.float32)


def row_means(values):
    """[N, ...] -> [N] in float32."""
    return jnp.mean(values.astype(jnp.float32).reshape(values.shape[0], -1), axis=1)


def squared(outputs):
    return row_means(jnp.square(outputs.astype(jnp.float32) - 0.3))


def perturbed(model, inputs, **kwargs):
    """Random parameters of a sensible scale, none of them zero or one, so that no term hides."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), inputs)["params"]
    generator = np.random.default_rng(300)

    def draw(path, leaf):
        scale = 0.2 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        centre = 1.0 if path[-1] == jax.tree_util.DictKey("scale") else 0.0
        return jnp.asarray(centre + scale * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def regression(model, inputs, **kwargs):
    """Mean squared outputs of ``model`` on one array."""

    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch, **kwargs))

    return loss_fn, perturbed(model, inputs, **kwargs), inputs


def language(model, rows, positions):
    """Next-token cross entropy of ``model`` on ids."""
    batch = {"ids": ids(rows, positions), "targets": ids(rows, positions, salt=1)}

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["ids"]).astype(jnp.float32)
        return row_means(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))

    return loss_fn, perturbed(model, batch["ids"]), batch
