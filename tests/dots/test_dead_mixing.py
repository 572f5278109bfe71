"""What does not reach the loss, or carries no gradient, may mix rows."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ghostjax import (
    GradDotProdEngine,
    conservation_error,
    testing,
    value_and_dots_fn,
    value_grad_and_dots,
)
from models.arrays import directions_like, draw
from tests.dots.checks import check, expected_stacked
from tests.variants import some_quick

B, F = 6, 4
PARAMS = {"w": draw(F, F), "b": draw(F, seed=1)}
X = draw(B, F, seed=2)


def hidden(p, x):
    return jnp.tanh(x @ p["w"])


def rows(p, x):
    return jnp.sum(jnp.square(hidden(p, x) * p["b"][None]), -1)


def centred(h):
    return h - h.mean(0, keepdims=True)


def similarities(p, h):
    return centred(h) @ h.T @ jnp.ones((B, F)) @ p["w"]


def shown(values):
    assert values.shape == (B, F)


def aux(p, x):
    h = hidden(p, x)
    return jnp.mean(rows(p, x)), {"similar": similarities(p, h), "h": h}


def of_a_call(wrap):
    """The loss and statistics come out of one function."""

    def loss_fn(p, x):
        losses, stats = wrap(lambda p, x: (rows(p, x), similarities(p, hidden(p, x))))(p, x)
        return jnp.mean(losses), stats

    return loss_fn


def of_a_loop(p, x):
    def layer(carry, w):
        h, stats = carry
        h = jnp.tanh(h @ w)
        return (h, stats + centred(h) @ p["w"]), h.mean(0) @ p["w"]

    (h, stats), means = lax.scan(layer, (x, jnp.zeros_like(x)), jnp.stack([p["w"]] * 2))
    return jnp.mean(jnp.sum(jnp.square(h * p["b"][None]), -1)), (stats, means)


def of_a_branch(p, x):
    losses, stats = lax.cond(
        x[0, 0] * 0 == 0,
        lambda p, x: (rows(p, x), centred(hidden(p, x)) @ p["w"]),
        lambda p, x: (rows(p, x), hidden(p, x)),
        p,
        x,
    )
    return jnp.mean(losses), stats


def printed(p, x):
    h = hidden(p, x)
    jax.debug.print("{}", centred(h)[0, 0] * p["b"])
    jax.debug.callback(shown, centred(h) @ p["w"])
    return jnp.mean(rows(p, x))


def printed_inside(p, x):
    @jax.jit
    @jax.checkpoint
    def block(p, x):
        h = hidden(p, x)
        jax.debug.callback(shown, centred(h) @ p["w"])
        return jnp.sum(jnp.square(h * p["b"][None]), -1)

    return jnp.mean(block(p, x))


def loop_rows(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"])
    return jnp.sum(jnp.square(h * p["b"][None]), -1)


def with_statistics(p, x, h):
    mean = lax.stop_gradient(h.mean(0, keepdims=True))
    whitening = lax.stop_gradient(jnp.linalg.inv(h.T @ h + jnp.eye(F)))
    return jnp.sum(jnp.sin((h - mean) @ whitening @ p["w"] + p["b"][None]), -1)


def statistics(p, x):
    return jnp.mean(with_statistics(p, x, hidden(p, x)))


def statistics_rows(p, x):
    fixed = hidden(PARAMS, x)
    mean, whitening = fixed.mean(0, keepdims=True), jnp.linalg.inv(fixed.T @ fixed + jnp.eye(F))
    return jnp.sum(jnp.sin((hidden(p, x) - mean) @ whitening @ p["w"] + p["b"][None]), -1)


def routed(p, x):
    """An expert takes as many rows as it has room for, in the order of the batch."""
    h = hidden(p, x)
    expert = jnp.argmax(h, -1)
    taken = jnp.cumsum(jax.nn.one_hot(expert, F, dtype=jnp.int32), 0)[jnp.arange(B), expert] <= 1
    order = jnp.argsort(expert)  # goes nowhere with a gradient
    return jnp.mean(rows(p, x) * taken.astype(jnp.float32)), order


def routed_rows(p, x):
    expert = jnp.argmax(hidden(PARAMS, x), -1)
    before = jnp.tril(expert[:, None] == expert[None], -1).any(1)
    return jnp.where(before, 0, rows(p, x))


def above_the_mean(p, x):
    """Rows take part if they are above the mean of the batch."""
    h = hidden(p, x)
    scores = jnp.sum(h, -1)
    return jnp.mean(jnp.where(scores > scores.mean(), rows(p, x), jnp.sum(h, -1)))


def above_the_mean_rows(p, x):
    scores = jnp.sum(hidden(PARAMS, x), -1)
    return jnp.where(scores > scores.mean(), rows(p, x), jnp.sum(hidden(p, x), -1))


CASES = {
    "aux": (aux, rows),
    "aux_of_a_call": (of_a_call(jax.jit), rows),
    "aux_of_what_is_rematerialised": (of_a_call(jax.checkpoint), rows),
    "aux_of_calls_in_calls": (of_a_call(lambda f: jax.jit(jax.checkpoint(jax.jit(f)))), rows),
    "aux_of_a_loop": (of_a_loop, loop_rows),
    "aux_of_a_branch": (of_a_branch, rows),
    "printed": (printed, rows),
    "printed_inside": (printed_inside, rows),
    "statistics_without_gradient": (statistics, statistics_rows),
    "routing_by_integers": (routed, routed_rows),
    "comparison_with_a_statistic": (above_the_mean, above_the_mean_rows),
}
WITHOUT_AUX = (
    "printed",
    "printed_inside",
    "statistics_without_gradient",
    "comparison_with_a_statistic",
)


SLOW = {"aux_of_a_call", "aux_of_what_is_rematerialised", "printed"}  # like others, less inside


@pytest.mark.parametrize("name", some_quick(CASES, lambda name: name not in SLOW))
def test_mixing_that_does_not_matter(name):
    loss_fn, row_losses = CASES[name]
    has_aux = name not in WITHOUT_AUX
    directions = directions_like(PARAMS)
    first = jax.tree.map(lambda leaf: leaf[0], directions)
    late = value_and_dots_fn(loss_fn, has_aux=has_aux)

    @jax.jit
    def run(params, x, first, directions):
        early = value_grad_and_dots(loss_fn, has_aux=has_aux)(params, x, direction=first)
        return early, late(params, x)[2].result(directions)

    early, several = run(PARAMS, X, first, directions)
    expected = expected_stacked(row_losses, PARAMS, X, directions)
    testing.assert_dots_close(early.dots, jax.tree.map(lambda leaf: leaf[0], expected))
    testing.assert_dots_close(several.dots, expected)
    output, grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=has_aux))(PARAMS, X)
    found = (early.value, early.aux) if has_aux else early.value
    chex.assert_trees_all_close((found, early.grads), (output, grads), rtol=1e-6, atol=1e-6)
    assert int(early.conflicts) == 0
    for result, vectors in ((early, first), (several, directions)):
        errors = conservation_error(result, vectors)
        assert max(np.max(leaf) for leaf in jax.tree.leaves(errors)) <= 1e-5


def test_aux_can_still_be_differentiated():
    def of_aux(run):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(run(p)["similar"]))))(PARAMS)

    fn = value_grad_and_dots(aux, has_aux=True)
    found = of_aux(lambda p: fn(p, X, direction=PARAMS).aux)
    testing.assert_dots_close(found, of_aux(lambda p: aux(p, X)[1]), rtol=1e-5)


def test_the_engine_does_not_mind_what_is_printed():
    def losses(p, x):
        jax.debug.callback(shown, centred(hidden(p, x)) @ p["w"])
        return rows(p, x)

    found = GradDotProdEngine(losses, val_batch_size=2)(PARAMS, X)
    testing.assert_dots_close(found.dots, testing.per_example_dots(rows, PARAMS, X, 2))


@pytest.mark.slow
@pytest.mark.parametrize("make", [value_grad_and_dots, value_and_dots_fn])
def test_a_single_row(make):
    """Nothing can be mixed."""

    def loss_fn(p, x):
        h = hidden(p, x)
        return jnp.mean(
            rows(p, x) + jnp.sum(h @ h.T @ (h - h.mean(0, keepdims=True) + p["b"][None]), -1)
        )

    x = X[:1]
    if make is value_grad_and_dots:
        found = jax.jit(lambda p: make(loss_fn)(p, x, direction=PARAMS).dots)(PARAMS)
    else:
        found = jax.jit(lambda p: make(loss_fn)(p, x)[2](PARAMS))(PARAMS)
    expected = jax.tree.map(lambda g, v: jnp.vdot(g, v)[None], jax.grad(loss_fn)(PARAMS, x), PARAMS)
    testing.assert_dots_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("params", [{}, {"frozen": {}}, []], ids=["dict", "nested", "list"])
def test_no_parameters(params):
    def loss_fn(params, x):
        return jnp.mean(x**2)

    result = value_grad_and_dots(loss_fn)(params, X, direction=params)
    assert result.dots == params
    value, grads, dots = value_and_dots_fn(loss_fn)(params, X)
    assert (grads, dots(params)) == (params, params)
    chex.assert_trees_all_close(value, result.value)


def test_wide_data_in_a_loop_with_narrow_parameters():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(B, F)))

        def row_losses(p, x):
            def layer(h, _):
                return jnp.tanh(h @ p["w"].astype(h.dtype) + p["b"][None].astype(h.dtype)), None

            return jnp.sum(jnp.square(lax.scan(layer, x, None, length=3)[0]), -1)

        def loss_fn(p, x):
            return jnp.mean(row_losses(p, x))

        directions = directions_like(PARAMS)
        first = jax.tree.map(lambda leaf: leaf[0], directions)
        expected = expected_stacked(row_losses, PARAMS, x, directions)
        early = jax.jit(lambda p: value_grad_and_dots(loss_fn)(p, x, direction=first).dots)(PARAMS)
        late = jax.jit(lambda p: value_and_dots_fn(loss_fn)(p, x)[2](directions))(PARAMS)
        testing.assert_dots_close(early, jax.tree.map(lambda leaf: leaf[0], expected))
        testing.assert_dots_close(late, expected)


class Named(nn.Module):
    """LayerNorm with statistics over a named axis of positions."""

    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.LayerNorm(axis_name="positions")(x))


def test_a_norm_over_a_named_axis():
    model = nn.vmap(
        Named,
        in_axes=1,
        out_axes=1,
        axis_name="positions",
        variable_axes={"params": None},
        split_rngs={"params": False},
    )()
    x = draw(B, 3, F)
    params = {"LayerNorm_0": {"scale": draw(F, seed=1), "bias": draw(F, seed=2)}}

    def row_losses(p, x):
        return jnp.sum(jnp.square(model.apply({"params": p}, x)) * jnp.arange(1.0, 5.0), (1, 2))

    with jax.numpy_rank_promotion("allow"):
        check(row_losses, params, x)


@pytest.mark.slow
def test_no_tracer_leaks():
    def loss_fn(p, x):
        block = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        h, _ = lax.scan(block, x, jnp.stack([p["w"]] * 2))
        h = jax.jit(lambda h: jnp.flip(h, 0))(h)
        return p["b"][0] * jnp.mean(h * p["b"][None])

    with jax.checking_leaks():
        jax.jit(lambda p: value_grad_and_dots(loss_fn)(p, X, direction=p).dots)(PARAMS)
        jax.jit(lambda p: value_and_dots_fn(loss_fn)(p, X)[2](p))(PARAMS)
        jax.jit(
            lambda p: (
                value_grad_and_dots(
                    lambda p, x: jnp.mean(centred(hidden(p, x)) * p["b"][None]), coupled="share"
                )(p, X, direction=p).dots
            )
        )(PARAMS)
