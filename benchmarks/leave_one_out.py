"""Claim: scores through the optimizer rank rows as leaving them out of a whole run does.

python -m benchmarks.leave_one_out

A run is 16 steps of AdamW on 32 rows each. The actual effect of a row in one of them is the mean
validation loss after the run was done again without it, minus that of the run: its share is taken
out of the gradient of its step, whose other rows keep their weight 1/32. "Own step" is the loss
right after that step, "whole run" that at the end, when the other steps have answered. Effects are
computed in float64.

Spearman correlation over 50 rows of a run, mean and standard deviation over five seeds. Runs start
at initial parameters, or after 150 steps. Scores:

- plain: < gradient of the row, validation gradient >, as of TracIn;
- cosine: the same over the sizes of both;
- through AdamW, at the current gradient, with the validation gradient at the parameters, half-way
  along the update, or where it leads.

Digits and a network with LayerNorms (benchmarks/_digits.py); prose and a model of the next byte
(benchmarks/_text.py). 64 validation rows.
"""

import os

os.environ["JAX_ENABLE_X64"] = "1"  # scores are of float32 runs

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

from benchmarks import _digits, _text
from benchmarks._common import save
from benchmarks.ground_truth import add, wide
from ghostjax import directions, value_grad_and_dots

SEEDS, STEPS, BATCH, REMOVED, VAL_ROWS = range(5), 16, 32, 50, 64
TX = optax.adamw(1e-3)
STARTS = (0, 150)
SCORES = (
    "plain",
    "cosine",
    "through AdamW",
    "through AdamW, midpoint",
    "through AdamW, look-ahead",
)


class Problem(NamedTuple):
    """A data set: ``draw(seed) -> (training rows, validation rows)``, and a model."""

    draw: Any
    init: Any
    row_losses: Any


def draw_digits(seed):
    data = _digits.draw(seed, VAL_ROWS)
    return data.train, data.val


def draw_text(seed):
    data = _text.draw(seed, "none", 0.0, VAL_ROWS, 1)
    return data.train, data.val


PROBLEMS = {
    "digits": Problem(draw_digits, _digits.init, _digits.row_losses),
    "text": Problem(draw_text, _text.init, _text.row_losses),
}


def take(rows, places):
    return jax.tree.map(lambda leaf: leaf[places], rows)


def scores_of(mean_loss, state, params, grads, batch, val):
    """By name, of the rows of one step, [B]."""
    updates, _ = TX.update(grads, state, params)
    val_grads = jax.grad(mean_loss)(params, val)
    found = [
        val_grads,
        directions.through_optimizer(TX, state, params, grads, val_grads),
        *(
            directions.through_optimizer(
                TX, state, params, grads, along(mean_loss, params, updates, val)
            )
            for along in (directions.midpoint, directions.look_ahead)
        ),
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    result = value_grad_and_dots(mean_loss, norms=True)(params, batch, direction=stacked)
    plain, *through = result.total()
    return dict(zip(SCORES, [plain, result.cosine(stacked)[0], *through], strict=True))


def run(problem, train, val, places, removed, params):
    """Scores of the removed rows, and their two effects, [2, REMOVED]."""

    def mean_loss(params, rows):
        return problem.row_losses(params, rows).mean()

    def warm(carry, places):
        params, state = carry
        grads = jax.grad(mean_loss)(params, take(train, places))
        updates, state = TX.update(grads, state, params)
        return (add(params, updates), state), None

    def scored(carry, places):
        params, state = carry
        batch = take(train, places)
        grads = jax.grad(mean_loss)(params, batch)
        return warm(carry, places)[0], scores_of(mean_loss, state, params, grads, batch, val)

    carry, _ = jax.lax.scan(warm, (params, TX.init(params)), places[:-STEPS])
    _, scores = jax.lax.scan(scored, carry, places[-STEPS:])
    start, wide_train, wide_val = wide((carry, train, val))

    def losses_without(row):
        """After every step; ``row`` -1: with all."""

        def step(carry, now):
            params, state = carry
            number, places = now
            weights = (jnp.arange(BATCH) + number * BATCH != row).astype(jnp.float64)
            batch = take(wide_train, places)
            grads = jax.grad(
                lambda params: jnp.sum(weights * problem.row_losses(params, batch)) / BATCH
            )(params)
            updates, state = TX.update(grads, state, params)
            params = add(params, updates)
            return (params, state), mean_loss(params, wide_val)

        return jax.lax.scan(step, start, (jnp.arange(STEPS), places[-STEPS:]))[1]

    without = jax.vmap(losses_without)(removed) - losses_without(-1)
    own = without[jnp.arange(REMOVED), removed // BATCH]
    return {name: found.ravel()[removed] for name, found in scores.items()}, {
        "own step": own,
        "whole run": without[:, -1],
    }


def measure(problem: Problem, start: int) -> dict[str, Any]:
    compiled = jax.jit(lambda *args: run(problem, *args))
    found = {name: {"own step": [], "whole run": []} for name in SCORES}
    for seed in SEEDS:
        train, val = problem.draw(seed)
        rows = len(jax.tree.leaves(train)[0])
        places = _digits.batches(seed, rows, BATCH, start + STEPS)
        removed = np.random.default_rng(seed).choice(STEPS * BATCH, REMOVED, replace=False)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), problem.init(seed))
        scores, effects = compiled(train, val, places, removed, params)
        for name in SCORES:
            for kind, effect in effects.items():
                found[name][kind].append(float(spearmanr(scores[name], effect).statistic))
    return {
        name: {
            kind: {"mean": np.mean(own), "std": np.std(own, ddof=1), "of_seeds": own}
            for kind, own in kinds.items()
        }
        for name, kinds in found.items()
    }


def main():
    results = {}
    for name, problem in PROBLEMS.items():
        for start in STARTS:
            found = results[f"{name}, after {start} steps"] = measure(problem, start)
            print(f"\n{name}, after {start} steps: Spearman, own step and whole run")
            for score, kinds in found.items():
                cells = "".join("{mean:8.3f} ({std:.3f})".format(**own) for own in kinds.values())
                print(f"{score:28s}{cells}", flush=True)
    save("leave_one_out", results)


if __name__ == "__main__":
    main()
