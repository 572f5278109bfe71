"""Claim: which rows of a noisy text to train on, at equal compute and at equal steps.

python -m benchmarks.selection
python -m benchmarks.selection --steps 8 --seeds 2     # a try, which saves nothing

Prose in bytes, a model that sees four of them (LayerNorm and a hidden layer), AdamW. At every step
a method sees 32 candidate rows, of which half are noise on average, and trains on 16 of them
(``selection.select_step``). Noise is one of two: the bytes of a row in random order ("shuffled", of
high loss), or four bytes over and over again ("boilerplate", of low loss); "none" has no noise.

Held-out prose is in three parts that have no row in common, the same for all seeds:

- scoring, of which every seed has 64 rows: scores have 16 of them at every step, "random, clean
  rows too" has all among its candidates;
- tuning, 256 rows: every method has, for every noise, the learning rate that is best there at
  equal compute, in the mean of two seeds that nothing is reported of. Rates are apart by a factor
  of the square root of 10, and as many are tried as it takes for the best not to be the first or
  the last;
- test, 512 rows: loss in nats per byte, mean over five other seeds.

Intervals are of 95% by Student's t over these seeds; those of differences from random rows are of
pairs, as runs of the same seed have the same noise, initial parameters and candidates. They are not
corrected for there being many.

- at equal compute: every method has the FLOPs of 400 plain steps on 16 rows;
- at equal steps: after as many steps as the most expensive method has at equal compute, at the
  learning rate for all of them.

FLOPs are XLA's; those of greedy selection, which loops, are those of the jaxpr.
"""

import argparse
import concurrent.futures
import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from benchmarks._common import figures, save
from benchmarks._digits import batches
from benchmarks._text import held_out, init, mean_loss, noisy, row_losses
from ghostjax._flops import flops
from ghostjax.selection import (
    at_random,
    by_loss,
    by_norm,
    by_score,
    greedy,
    select_step,
)

CANDIDATES, CHOSEN, VAL_BATCH = 32, 16, 16
VAL_ROWS, TUNE_ROWS, TEST_ROWS = 64, 256, 512
STEPS = 400  # plain ones, of CHOSEN rows
CHOOSE, REPORT = (100, 101), range(200, 205)
HALF_DECADES = (-5, -4, -3)  # learning rates 10 ** (n / 2) to begin with
NOISES = {"shuffled": 0.5, "boilerplate": 0.5, "none": 0.0}
BASELINE, COMPUTE, EQUAL_STEPS = "random", "equal compute", "equal steps"


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


class Rows(NamedTuple):
    """Of one seed, tokens [n, POSITIONS + 1]; ``is_noise`` of the training rows."""

    train: Any
    is_noise: Any
    val: Any
    tune: Any
    test: Any


def draw(seed: int, noise: str, share: float) -> Rows:
    generator = np.random.default_rng(seed)
    tune, test, scoring = held_out(TUNE_ROWS, TEST_ROWS)
    val = scoring[generator.permutation(len(scoring))[:VAL_ROWS]]
    return Rows(*noisy(generator, noise, share), val, tune, test)


def step_of(method, optimizer):
    policy, count, options = METHODS[method]
    return select_step(row_losses, optimizer, count, policy, **options)


def plain_step(optimizer, params, state, rows):
    grads = jax.grad(mean_loss)(params, rows)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def costs() -> dict[str, float]:
    """Of every method, its FLOPs over those of a plain step on ``CHOSEN`` rows."""
    optimizer = optax.adamw(1e-2)
    params = init(0)
    data = draw(0, "none", 0.0)
    state, key = optimizer.init(params), jax.random.key(0)
    args = params, state, data.train[:CANDIDATES], data.val[:VAL_BATCH]
    plain = functools.partial(plain_step, optimizer)
    plain_args = params, state, data.train[:CHOSEN]

    def of_jaxpr(function, *args):
        return flops(jax.make_jaxpr(function)(*args).jaxpr)

    of_plain = figures(plain, *plain_args)["gflop"]
    found = {}
    for method in METHODS:
        with_key = functools.partial(step_of(method, optimizer), key=key)
        if method == "greedy":
            found[method] = of_jaxpr(with_key, *args) / of_jaxpr(plain, *plain_args)
        else:
            # XLA counts both branches: here all rows are finite.
            with mock.patch("jax.lax.cond", lambda is_finite, taken, _: taken()):
                found[method] = figures(with_key, *args)["gflop"] / of_plain
    return found


@functools.cache
def trainer(method: str):
    """``train(carry, rows, candidates, seed, learning rate, start, stop)`` -> carry: parameters,
    state of the optimizer, and the shares of noise in what was trained on, added up."""

    @jax.jit
    def train(carry, rows, candidates, seed, rate, start, stop):
        step = step_of(method, optax.adamw(rate))

        def one(number, carry):
            params, state, noise = carry
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
            places = candidates[number]
            val = jax.random.choice(keys[0], rows.val, (VAL_BATCH,), replace=False)
            params, state, selected = step(params, state, rows.train[places], val, key=keys[1])
            return params, state, noise + rows.is_noise[places][selected.rows].mean()

        return jax.lax.fori_loop(start, stop, one, carry)

    return train


loss_of = jax.jit(mean_loss)


def run(method: str, rows: Rows, seed: int, rate: float, stops: list[int]) -> tuple[list, float]:
    """Parameters after so many steps; the share of noise in what was trained on."""
    if method == "random, clean rows too":
        train = np.concatenate([rows.train, rows.val])
        rows = rows._replace(
            train=train, is_noise=np.append(rows.is_noise, np.zeros(VAL_ROWS, bool))
        )
    candidates = batches(seed, len(rows.train), CANDIDATES, stops[-1])
    params = init(seed)
    carry = params, optax.adamw(rate).init(params), jnp.zeros(())
    found = []
    for start, stop in zip([0, *stops], stops):
        carry = trainer(method)(carry, rows, candidates, seed, np.float32(rate), start, stop)
        found.append(carry[0])
    return found, float(carry[2] / stops[-1])


def tuned(of_rate) -> dict[float, float]:
    """Rates and their losses, with more at either end until the best is not one of the ends."""
    found = {place: of_rate(10 ** (place / 2)) for place in HALF_DECADES}
    while True:
        best = min(found, key=found.get)
        if min(found) < best < max(found):
            return {10 ** (place / 2): found[place] for place in sorted(found)}
        place = best - 1 if best == min(found) else best + 1
        found[place] = of_rate(10 ** (place / 2))


def measure(method: str, noise: str, budgets: dict[str, int], seeds: int) -> dict[str, Any]:
    fewest, steps = min(budgets.values()), budgets[method]
    drawn = {seed: draw(seed, noise, NOISES[noise]) for seed in (*CHOOSE, *REPORT)}

    def tuning(rate):
        def one(seed):
            (params,), _ = run(method, drawn[seed], seed, rate, [steps])
            return loss_of(params, drawn[seed].tune)

        loss = np.mean(list(pool.map(one, CHOOSE[:seeds])))
        return float(np.where(np.isfinite(loss), loss, np.inf))

    def reported(seed):
        found, noise = run(method, drawn[seed], seed, rate, [fewest, steps])
        return [loss_of(params, drawn[seed].test) for params in found], noise

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        by_rate = tuned(tuning)
        rate = min(by_rate, key=by_rate.get)
        losses, noises = zip(*pool.map(reported, REPORT[:seeds]), strict=True)
    losses = np.array(losses)
    assert np.isfinite(losses).all()
    return {
        "steps": steps,
        "learning_rate": rate,
        "loss of tuning": {f"{rate:.2g}": loss for rate, loss in by_rate.items()},
        COMPUTE: {"of_seeds": losses[:, 1].tolist()},
        EQUAL_STEPS: {"after": fewest, "of_seeds": losses[:, 0].tolist()},
        "noise": float(np.mean(noises)),
    }


def summarized(table: dict[str, dict]) -> None:
    """Adds means and 95% intervals over seeds, of losses and of the differences of pairs."""

    def interval(values):
        return [float(end) for end in stats.ttest_1samp(values, 0).confidence_interval(0.95)]

    for method, row in table.items():
        for kind in (COMPUTE, EQUAL_STEPS):
            losses = np.array(row[kind]["of_seeds"])
            row[kind] |= {"loss": float(losses.mean()), "interval": interval(losses)}
            if method != BASELINE:
                more = losses - table[BASELINE][kind]["of_seeds"]
                row[kind] |= {"over random": float(more.mean()), "its interval": interval(more)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="plain ones, the compute of all")
    parser.add_argument("--seeds", type=int, default=len(REPORT), help="of those that are reported")
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=list(NOISES))
    options = parser.parse_args()
    cost = costs()
    budgets = {name: round(options.steps / own) for name, own in cost.items()}
    tables = {noise: {} for noise in options.noise}
    for method, noise in itertools.product(METHODS, options.noise):
        table = tables[noise]
        table[method] = {"cost": cost[method]} | measure(method, noise, budgets, options.seeds)
        summarized(table)
        row = table[method]
        print(f"{noise:12s}{method:24s}{cost[method]:5.2f}{row['steps']:5d}", end="")
        print(f"{row['learning_rate']:8.2g}{row['noise']:6.0%} noise", end="")
        for kind in (COMPUTE, EQUAL_STEPS):
            print("{loss:8.3f} [{interval[0]:.3f}, {interval[1]:.3f}]".format(**row[kind]), end="")
        print(flush=True)
    if (options.steps, options.seeds) == (STEPS, len(REPORT)):
        save("selection", tables, keep=True)


if __name__ == "__main__":
    main()
