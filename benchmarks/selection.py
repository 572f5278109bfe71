"""Claim: which rows of a noisy text to train on, at equal compute and at equal steps.

python -m benchmarks.selection

Prose in bytes, a model that sees four of them (LayerNorm and a hidden layer), AdamW. At every step
a method sees 32 candidate rows, of which half are noise on average, and trains on 16 of them
(``selection.select_step``). Noise is one of two: the bytes of a row in random order ("shuffled", of
high loss), or four bytes over and over again ("boilerplate", of low loss); "none" has no noise.
Scores have 16 clean rows of held-out prose for validation, drawn from 64 at every step; "random,
clean rows too" has these 64 among its candidates.

Loss in nats per byte on 512 other rows, mean over five seeds and standard deviation:

- at equal compute: every method has the FLOPs of 800 plain steps on 16 rows;
- at equal steps: after as many steps as the most expensive method has at equal compute.

FLOPs are XLA's; those of greedy selection, which loops, are those of the jaxpr. Every method has
the better of two learning rates at equal compute, chosen on another seed.

What came out: scores are ahead of random rows, and of all rows, for either noise and even at equal
compute, most of all without embedding and head, which costs less. Low loss is better yet where
noise has a high loss, and far worse than random where it has a low one, as large gradients are for
both. Without noise nothing beats random rows at equal compute. Greedy selection chooses about as
well as scores alone, and costs the most. The learning rates are coarse: in most rows the larger of
them was chosen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._common import figures, save
from benchmarks._text import draw, init, mean_loss, row_losses
from ghostjax._flops import flops
from ghostjax.selection import (
    at_random,
    by_loss,
    by_norm,
    by_score,
    greedy,
    select_step,
)

CANDIDATES, CHOSEN, VAL_BATCH, VAL_ROWS, TEST_ROWS = 32, 16, 16, 64, 512
STEPS = 800  # plain ones, of CHOSEN rows
EVERY = 20
RATES = (1e-2, 3e-2)
CHOOSE, REPORT = (100,), range(200, 205)
NOISES = {"shuffled": 0.5, "boilerplate": 0.5, "none": 0.0}


def greedily(rows, k):
    return greedy(rows.scores, rows.gram, k, interaction=0.1 / k**2)


METHODS = {  # name: policy, how many rows, options
    "random": (at_random, CHOSEN, {}),
    "random, clean rows too": (at_random, CHOSEN, {}),
    "all 32": (at_random, CANDIDATES, {}),
    "low loss": (by_loss, CHOSEN, {}),
    "gradient norm": (by_norm, CHOSEN, {}),
    "score, plain": (by_score, CHOSEN, {"through_optimizer": False}),
    "score, through AdamW": (by_score, CHOSEN, {}),
    "score, plain, no head": (
        by_score,
        CHOSEN,
        {"through_optimizer": False, "exclude": ["embed/*", "head/*"]},
    ),
    "greedy": (greedily, CHOSEN, {"through_optimizer": False}),
}


def step_of(method, optimizer):
    policy, count, options = METHODS[method]
    return select_step(row_losses, optimizer, count, policy, **options)


def plain_step(optimizer, params, state, rows):
    grads = jax.grad(mean_loss)(params, rows)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def costs() -> dict[str, float]:
    """Of every method, its FLOPs over those of a plain step on ``CHOSEN`` rows."""
    optimizer = optax.adamw(RATES[0])
    params = init(0)
    data = draw(0, "none", 0.0, VAL_ROWS, TEST_ROWS)
    state, key = optimizer.init(params), jax.random.key(0)
    args = params, state, data.train[:CANDIDATES], data.val[:VAL_BATCH]
    plain = functools.partial(plain_step, optimizer)
    plain_args = params, state, data.train[:CHOSEN]

    def of_jaxpr(function, *args):
        return flops(jax.make_jaxpr(function)(*args).jaxpr)

    found = {}
    for method in METHODS:
        step = step_of(method, optimizer)
        with_key = functools.partial(step, key=key)
        if method == "greedy":
            found[method] = of_jaxpr(with_key, *args) / of_jaxpr(plain, *plain_args)
        else:
            whole = figures(with_key, *args)["gflop"]
            found[method] = whole / figures(plain, *plain_args)["gflop"]
    return found


@functools.cache
def trainer(method: str, steps: int):
    """``run(data, seed, learning rate)`` -> test losses every 20 steps, and the share of noise that
    was trained on in every 20."""

    @jax.jit
    def run(data, seed, rate):
        step = step_of(method, optax.adamw(rate))
        pool, is_noise = data.train, data.is_noise
        if method == "random, clean rows too":
            pool = jnp.concatenate([pool, data.val])
            is_noise = jnp.concatenate([is_noise, jnp.zeros(VAL_ROWS, bool)])

        def one(carry, number):
            params, state = carry
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 3)
            places = jax.random.choice(keys[0], len(pool), (CANDIDATES,), replace=False)
            val = jax.random.choice(keys[1], data.val, (VAL_BATCH,), replace=False)
            *carry, selected = step(params, state, pool[places], val, key=keys[2])
            return tuple(carry), is_noise[places][selected.rows].mean()

        def block(carry, numbers):
            carry, noise = jax.lax.scan(one, carry, numbers)
            return carry, (mean_loss(carry[0], data.test), noise.mean())

        params = init(seed)
        carry = params, optax.adamw(rate).init(params)
        return jax.lax.scan(block, carry, jnp.arange(steps).reshape(-1, EVERY))[1]

    return run


def measure(noise: str, share: float, cost: dict[str, float]) -> dict:
    budgets = {name: round(STEPS / own / EVERY) * EVERY for name, own in cost.items()}
    fewest = min(budgets.values())
    drawn = {seed: draw(seed, noise, share, VAL_ROWS, TEST_ROWS) for seed in (*CHOOSE, *REPORT)}
    table = {}
    for method, steps in budgets.items():
        run = trainer(method, steps)

        def last(rate, run=run):
            found = np.mean([run(drawn[seed], seed, np.float32(rate))[0][-1] for seed in CHOOSE])
            return np.where(np.isfinite(found), found, np.inf)

        rate = min(RATES, key=last)
        curves, noise_shares = zip(
            *(run(drawn[seed], seed, np.float32(rate)) for seed in REPORT), strict=True
        )
        curves = np.array(curves)
        assert np.isfinite(curves).all()
        table[method] = {"cost": cost[method], "steps": steps, "learning_rate": rate}
        places = {"equal compute": -1, f"equal steps, {fewest}": fewest // EVERY - 1}
        for kind, place in places.items():
            table[method][kind] = {
                "loss": float(curves[:, place].mean()),
                "std": float(curves[:, place].std(ddof=1)),
                "of_seeds": curves[:, place].tolist(),
            }
        table[method]["noise"] = float(np.mean(noise_shares))
        print(
            f"{noise:12s}{method:30s}{cost[method]:6.2f}{steps:6d}{rate:8g}"
            + "".join(
                f"{table[method][kind]['loss']:9.3f} ({table[method][kind]['std']:.3f})"
                for kind in places
            )
            + f"{table[method]['noise']:8.0%}",
            flush=True,
        )
    return table


def main():
    cost = costs()
    print(
        f"{'noise':12s}{'method':30s}{'cost':>6s}{'steps':>6s}{'rate':>8s}   equal compute", end=""
    )
    print("       equal steps   noise trained on")
    for noise, share in NOISES.items():
        save("selection", {noise: measure(noise, share, cost)}, keep=True)


if __name__ == "__main__":
    main()
