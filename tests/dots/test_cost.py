"""What dots cost by XLA's own figures, on the GPT-2 shape that costs are measured on.

The floor of any exact method is a plain step and the gradient of the validation rows. How much
LLVM optimizes changes neither FLOPs nor scratch memory: both are fixed before.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from ghostjax import directions, explain, value_and_dots_fn, value_grad_and_dots
from models import measured

TRAIN_ROWS, VAL_ROWS = 4, 4
SIZES = {"layers": 2, "features": 128, "heads": 4, "positions": 64, "vocabulary": 512}


@pytest.fixture(scope="module")
def setup():
    """``(loss_fn, (params, train, val))`` of that shape, made smaller."""
    with jax.numpy_rank_promotion("allow"):
        row_losses, params, batch = measured.setup(TRAIN_ROWS + VAL_ROWS, **SIZES)
        train = jax.tree.map(lambda leaf: leaf[:TRAIN_ROWS], batch)
        val = jax.tree.map(lambda leaf: leaf[TRAIN_ROWS:], batch)
        yield lambda params, batch: jnp.mean(row_losses(params, batch)), (params, train, val)


@pytest.fixture(scope="module")
def forward_flops(setup):
    loss_fn, (params, train, _) = setup
    return figures(loss_fn, params, train)[0]


def figures(function, *args):
    """XLA's FLOPs and bytes of scratch memory."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_cost_over_the_floor(setup, forward_flops):
    loss_fn, args = setup
    fn = value_grad_and_dots(loss_fn)

    def floor(params, train, val):
        return jax.value_and_grad(loss_fn)(params, train), jax.grad(loss_fn)(params, val)

    def with_dots(params, train, val):
        result = fn(params, train, direction=jax.grad(loss_fn)(params, val))
        return result.value, result.grads, result.total()

    floor_flops, floor_bytes = figures(floor, *args)
    flops, scratch_bytes = figures(with_dots, *args)
    assert flops <= 1.01 * (floor_flops + forward_flops)
    assert scratch_bytes <= 1.10 * floor_bytes
    assert flops > floor_flops + 0.5 * forward_flops  # or XLA counts something else


@pytest.mark.slow
def test_cost_of_a_direction_made_of_the_gradient(setup, forward_flops):
    """The training rows see one forward and one backward pass, though the direction comes late."""
    loss_fn, args = setup
    optimizer = optax.sgd(0.1, momentum=0.9)

    def through_optimizer(params, grads, val):
        state, val_grads = optimizer.init(params), jax.grad(loss_fn)(params, val)
        return directions.through_optimizer(optimizer, state, params, grads, val_grads)

    def floor(params, train, val):
        value, grads = jax.value_and_grad(loss_fn)(params, train)
        return value, grads, through_optimizer(params, grads, val)

    def with_dots(params, train, val):
        value, grads, dots = value_and_dots_fn(loss_fn)(params, train)
        return value, grads, dots.result(through_optimizer(params, grads, val)).total()

    floor_flops, floor_bytes = figures(floor, *args)
    flops, scratch_bytes = figures(with_dots, *args)
    assert flops <= 1.01 * (floor_flops + forward_flops)
    assert scratch_bytes <= 1.10 * floor_bytes


@pytest.mark.slow
def test_cost_of_further_directions(setup, forward_flops):
    """K directions repeat the products with directions, at most, and nothing else."""
    loss_fn, (params, train, _) = setup

    def early(params, train, directions):
        result = value_grad_and_dots(loss_fn)(params, train, direction=directions)
        return result.value, result.grads, result.total()

    def late(params, train, directions):
        value, grads, dots = value_and_dots_fn(loss_fn)(params, train)
        return value, grads, dots.result(directions).total()

    def stacked(count):
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), params)

    for many in (early, late):
        one_flops, _ = figures(many, params, train, stacked(1))
        four_flops, _ = figures(many, params, train, stacked(4))
        assert four_flops - one_flops <= 1.01 * 3 * forward_flops


@pytest.mark.slow
def test_explained_cost(setup):
    """``explain`` says beforehand what XLA counts."""
    loss_fn, (params, train, _) = setup

    def with_dots(params, train, direction):
        result = value_grad_and_dots(loss_fn)(params, train, direction=direction)
        return result.value, result.grads, result.dots

    explanation = explain(loss_fn)(params, train)
    plain_flops, _ = figures(jax.value_and_grad(loss_fn), params, train)
    flops, _ = figures(with_dots, params, train, params)
    assert {str(use.route) for use in explanation.uses} == {"tangent"}
    assert explanation.plain_flops == pytest.approx(plain_flops, rel=0.03)
    extra = explanation.flops - explanation.plain_flops
    assert extra == pytest.approx(flops - plain_flops, rel=0.03)
    assert explanation.cost == pytest.approx(flops / plain_flops, rel=0.01)


def test_late_directions_keep_no_cotangents_of_what_is_repeated(setup):
    """A bias leaves a gradient per row, not the cotangents that the product before it keeps too."""
    loss_fn, (params, train, _) = setup
    explanation = explain(loss_fn)(params, train)
    biases = [use for use in explanation.uses if use.parameter.endswith("['bias']")]
    sizes = [leaf.size for path, leaf in jax.tree.leaves_with_path(params) if "bias" in str(path)]
    assert len(biases) == len(sizes) > 0
    assert sum(use.late_bytes for use in biases) == 4 * TRAIN_ROWS * sum(sizes)
