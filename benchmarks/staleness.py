"""Claim: how many steps a validation gradient may serve depends on how fast the model learns.

python -m benchmarks.staleness

AdamW on 32 rows a step, from initial parameters. At every second step after the 20th, the rows'
scores through the optimizer are made with the validation gradient of n steps ago, n = 0 being
fresh:

- validation gradient: it alone is old, the optimizer is linearised at this step. What is saved is
  the pass over the validation rows;
- whole direction: the optimizer's derivative is as old.

Spearman correlation over the rows of a step with the scores of the fresh direction, and with the
actual effect: the validation loss after this step's update without the row's share of the gradient,
minus that with it, in float64. Mean over steps and three seeds, and the 10% quantile over them.

Digits and a network with LayerNorms (benchmarks/_digits.py), 150 steps at learning rates 1e-3 and
1e-2; prose and a model of the next byte (benchmarks/_text.py), 60 steps at 1e-3. 64 validation
rows.
"""

import os

os.environ["JAX_ENABLE_X64"] = "1"  # scores are of float32 runs

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

from benchmarks import _digits
from benchmarks._common import save
from benchmarks.ground_truth import add, wide
from benchmarks.leave_one_out import PROBLEMS, Problem, take
from ghostjax import directions, value_grad_and_dots

SEEDS, BATCH, FIRST, EVERY = range(3), 32, 20, 2
AGES = (0, 1, 2, 4, 8, 16)
KINDS = ("validation gradient", "whole direction")
RUNS = {  # problem, learning rate, steps
    "digits, 1e-3": ("digits", 1e-3, 150),
    "digits, 1e-2": ("digits", 1e-2, 150),
    "text, 1e-3": ("text", 1e-3, 60),
}


def effects(problem: Problem, tx, state, params, batch, val):
    """[B], of leaving out a row's share of one update."""
    state, params, batch, val = wide((state, params, batch, val))
    losses = problem.row_losses

    def loss_after(weights):
        grads = jax.grad(lambda params: jnp.sum(weights * losses(params, batch)) / BATCH)(params)
        return losses(add(params, tx.update(grads, state, params)[0]), val).mean()

    return jax.lax.map(loss_after, 1 - jnp.eye(BATCH)) - loss_after(jnp.ones(BATCH))


def run(problem: Problem, tx, train, val, places, params):
    """Of every scored step, scores by kind and age [steps, 2, ages, B], and effects [steps, B]."""

    def mean_loss(params, rows):
        return problem.row_losses(params, rows).mean()

    def push(history, newest):
        """With the newest first."""
        return jax.tree.map(
            lambda old, new: jnp.concatenate([new[None], old[:-1]]), history, newest
        )

    def scores(state, params, batch, grads, histories):
        old = jax.tree.map(lambda leaf: leaf[np.array(AGES)], histories)
        renewed = directions.through_optimizer(tx, state, params, grads, old[0])
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), renewed, old[1])
        result = value_grad_and_dots(mean_loss)(params, batch, direction=stacked)
        return result.total().reshape(2, len(AGES), BATCH), effects(
            problem, tx, state, params, batch, val
        )

    def step(carry, now):
        params, state, histories = carry
        number, places = now
        batch = take(train, places)
        grads = jax.grad(mean_loss)(params, batch)
        val_grads = jax.grad(mean_loss)(params, val)
        direction = directions.through_optimizer(tx, state, params, grads, val_grads)
        histories = push(histories[0], val_grads), push(histories[1], direction)
        nothing = jnp.zeros((2, len(AGES), BATCH), jnp.float32), jnp.zeros(BATCH, jnp.float64)
        found = jax.lax.cond(
            (number >= FIRST) & (number % EVERY == 0),
            lambda: scores(state, params, batch, grads, histories),
            lambda: nothing,
        )
        updates, state = tx.update(grads, state, params)
        return (add(params, updates), state, histories), found

    empty = jax.tree.map(lambda leaf: jnp.zeros((max(AGES) + 1, *leaf.shape), leaf.dtype), params)
    numbers = jnp.arange(len(places))
    _, found = jax.lax.scan(step, (params, tx.init(params), (empty, empty)), (numbers, places))
    return jax.tree.map(lambda leaf: leaf[FIRST::EVERY], found)


def correlation(first, second) -> float:
    return float(spearmanr(first, second).statistic)


def measure(name: str, learning_rate: float, steps: int) -> dict[str, Any]:
    problem, tx = PROBLEMS[name], optax.adamw(learning_rate)
    compiled = jax.jit(lambda *args: run(problem, tx, *args))
    scores, actual = [], []
    for seed in SEEDS:
        train, val = problem.draw(seed)
        places = _digits.batches(seed, len(jax.tree.leaves(train)[0]), BATCH, steps)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), problem.init(seed))
        of_seed, effect = compiled(train, val, places, params)
        scores.append(np.asarray(of_seed))
        actual.append(np.asarray(effect))
    scores, actual = np.concatenate(scores), np.concatenate(actual)
    result = {}
    for kind, own in zip(KINDS, np.moveaxis(scores, 1, 0), strict=True):
        result[kind] = {}
        for number, age in enumerate(AGES):
            found = {
                "with fresh": list(map(correlation, own[:, number], own[:, 0])),
                "with effect": list(map(correlation, own[:, number], actual)),
            }
            result[kind][str(age)] = {
                other: {"mean": np.mean(values), "10%": np.quantile(values, 0.1)}
                for other, values in found.items()
            }
    return result


def main():
    results = {}
    for name, sizes in RUNS.items():
        results[name] = measure(*sizes)
        for kind, ages in results[name].items():
            print(f"\n{name}: {kind} n steps old; Spearman, mean (10% quantile)")
            for age, found in ages.items():
                cells = ("{mean:8.3f} ({10%:.2f})".format(**own) for own in found.values())
                print(f"  {age:>3s}  " + "".join(cells), flush=True)
    save("staleness", results)


if __name__ == "__main__":
    main()
