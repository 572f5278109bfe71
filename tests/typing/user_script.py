"""What a user writes, for a type checker: the public names resolve, with their types.

``mypy --strict`` reads it in .ci/run. A comment that ignores an error is an error where there is
none, so that the last lines show that names and types are not simply unknown.
"""

from typing import Any

import jax
import jax.numpy as jnp

import ghostjax
from ghostjax import (
    EngineResult,
    Explanation,
    GradDotProdEngine,
    GradDots,
    InRunValues,
    LateDots,
    NormCosts,
    RunLog,
    StepMemory,
    Task,
    aggregate,
    aggregate_and_log,
    by_kind,
    conservation_error,
    directions,
    explain,
    pairwise_dots,
    register_row_rule,
    rowwise,
    run,
    squared_norms,
    value_and_clipped_grad,
    value_and_dots_fn,
    value_grad_and_dots,
)
from ghostjax.linen import layernorm_dot_products
from ghostjax.selection import top_k
from ghostjax.testing import assert_dots_close

Params = dict[str, jax.Array]


def loss_fn(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(batch @ params["w"]))


def row_losses(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.square(batch @ params["w"])


def use(params: Params, batch: jax.Array, optimizer: Any) -> None:
    result: GradDots = value_grad_and_dots(loss_fn)(params, batch, direction=params)
    total: jax.Array = result.total()
    dots: LateDots = value_and_dots_fn(loss_fn)(params, batch)[2]
    late: GradDots = dots.result(params)
    engine = GradDotProdEngine(row_losses, val_batch_size=2)
    of_engine: EngineResult = engine(params, batch)
    assert_dots_close(of_engine.dots, late.dots)
    explained: Explanation = explain(loss_fn, budget=2**30)(params, batch)
    memory: StepMemory = explained.memory
    norms: NormCosts = explained.norms
    values: InRunValues = InRunValues.zeros(8).add(jnp.arange(4), aggregate(result.dots))
    direction = directions.through_optimizer(
        optimizer, optimizer.init(params), params, result.grads, params
    )
    weights: jax.Array = top_k(total, 2)
    print(explained, memory.bytes, norms.flops, values.of("val"), weights)
    print(conservation_error(result, direction))
    print(squared_norms(loss_fn)(params, batch), pairwise_dots(loss_fn)(params, batch))
    print(value_and_clipped_grad(loss_fn, 1.0)(params, batch), layernorm_dot_products)
    print(
        register_row_rule,
        rowwise,
        aggregate_and_log,
        by_kind,
        RunLog.__name__,
        ghostjax.fidelity.summarize,
        ghostjax.selection.rows,
    )


def train(examples: list[dict[str, Any]], init: Any) -> dict[str, Any]:
    task = Task(examples[8:], {"val": examples[:8]}, init, row_losses)
    return run(task, "out", steps=8)


def misuse() -> None:
    ghostjax.value_grad_and_dot(loss_fn)  # type: ignore[attr-defined]
    value_grad_and_dots(loss_fn, norm=True)  # type: ignore[call-arg]
    GradDotProdEngine(row_losses, val_batch_size="2")  # type: ignore[arg-type]
