"""Parameters and optimizers for tests of directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 7


def draw_like(params, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), params
    )


def schedule(count):
    return 0.1 / (1 + count)


def by_kind(first, second):
    labels = {"w": "first", "layer": {"b": "second", "s": "second"}}
    return optax.multi_transform({"first": first, "second": second}, labels)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(schedule, weight_decay=0.1),
    "clipped_adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.1)
    ),
    "adam_clipped_afterwards": lambda: optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-0.1)
    ),
    "clipping_that_does_nothing": lambda: optax.chain(
        optax.clip_by_global_norm(1e3), optax.sgd(0.1)
    ),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "multi_transform": lambda: by_kind(optax.adam(1e-2), optax.sgd(0.1)),
    "frozen": lambda: by_kind(optax.adam(1e-2), optax.set_to_zero()),
    "nadam": lambda: optax.nadam(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "adagrad": lambda: optax.adagrad(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule),
    "if_finite": lambda: optax.apply_if_finite(by_kind(optax.adam(1e-2), optax.set_to_zero()), 3),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
}


def warmed_up(tx, params, steps=STEPS):
    """The state after some steps, so that moments are not zero."""
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, steps + 1):
        _, state = update(draw_like(params, seed), state, params)
    return state


def losses_of(params, x):
    return jnp.mean(
        jnp.square(jnp.tanh(x @ params["w"]) * params["layer"]["s"] + params["layer"]["b"][None]),
        axis=1,
    )
