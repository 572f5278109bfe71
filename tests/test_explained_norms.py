"""Norms that explain tells: routes are those that run, FLOPs those that XLA counts."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _models
from ghostjax import _row_gradients, explain, squared_norms, value_and_clipped_grad
from ghostjax._early import value_grad_and_dots
from ghostjax._flops import flops
from ghostjax._norms import trace_rows
from ghostjax._row_gradients import row_pass
from ghostjax.core import routes, squares
from tests.dots.checks import draw

ROWS, T, F, LAYERS = 6, 4, 16, 2
X = draw(ROWS, T, F)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (ROWS, T)))
TABLE, W = draw(40, F), draw(F, F, seed=3) / 4


def mean(array):
    return jnp.mean(jnp.square(array))


def layers_in_a_loop(p, x):
    def layer(x, own):
        return jnp.tanh(x @ own["w"] + own["b"][None, None] + p["every"][None, None]), None

    return mean(jax.lax.scan(layer, x, p["layers"])[0])


def in_a_branch(p, x):
    long = jnp.concatenate([x[..., :3]] * 20, axis=1)
    branches = lambda x: x @ p["small"], lambda x: x @ (2 * p["small"])  # noqa: E731
    return mean(jax.lax.cond(jnp.sum(x) > 0, *branches, long))


# Of each: the loss, parameters, batch, and by parameter its uses and route.
CASES = {
    "dense": (
        lambda p, x: mean(jnp.tanh(x @ p["w"] + p["b"][None, None])),
        {"b": draw(F), "unused": draw(2), "w": W},
        X,
        {"b": (1, "features"), "w": (1, "gram")},
    ),
    "many_positions": (
        lambda p, x: mean(jnp.sin(x) @ p["w"]),
        {"w": draw(3, 2)},
        draw(ROWS, 60, 3),
        {"w": (1, "rows")},
    ),
    "convolution": (
        lambda p, x: mean(jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", **SEQUENCE)),
        {"w": draw(3, F, 8)},
        X,
        {"w": (1, "windows")},
    ),
    "looked_up": (
        lambda p, ids: mean(jnp.sin(p["table"][ids])),
        {"table": TABLE},
        IDS,
        {"table": (1, "pairs")},
    ),
    "looked_up_often": (
        lambda p, ids: mean(jnp.sin(p["table"][ids % 3])),
        {"table": draw(3, 2)},
        jnp.tile(IDS, (1, 15)),
        {"table": (1, "rows")},
    ),
    "tied": (
        lambda p, ids: mean(jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T),
        {"table": TABLE, "w": W},
        IDS,
        {"table": (2, "pairs"), "w": (1, "gram")},
    ),
    "sums_of_parameters": (
        lambda p, x: mean(x @ (p["w"] + p["a"] @ p["b"])),
        {"a": draw(F, 2), "b": draw(2, F), "w": W},
        X,
        {name: (1, "together") for name in "abw"},
    ),
    "layers_in_a_loop": (
        layers_in_a_loop,
        {"every": draw(F), "layers": {"b": draw(LAYERS, F), "w": jnp.stack([W] * LAYERS)}},
        X,
        {
            "every": (LAYERS, "together"),
            "layers']['b": (LAYERS, "features"),
            "layers']['w": (LAYERS, "gram"),
        },
    ),
    "in_a_branch": (in_a_branch, {"small": draw(3, 2)}, X, {"small": (2, "together")}),
    "sorted_rows": (
        lambda p, x: mean(x[jnp.argsort(x[:, 0, 0])] @ p["w"]),
        {"w": W},
        X,
        {"w": (1, "together")},
    ),
}
SEQUENCE = {"dimension_numbers": ("NTC", "TIO", "NTC")}


def told(explanation):
    return {norm.parameter: (norm.uses, norm.route) for norm in explanation.norms.parameters}


@pytest.fixture
def ran(monkeypatch):
    """By number of the parameter, the routes whose functions are called."""
    found, inside = collections.defaultdict(set), []

    def spy(owner, name, route, paths=lambda *_: inside[-1] if inside else ()):
        function = getattr(owner, name)

        @functools.wraps(function)
        def noted(*args, **kwargs):
            for path in paths(*args):
                found[path].add(route)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    def moving(left, *keys):
        return [path for key in keys for path in left.found.meetings[key].moving]

    own = squares.RowMeeting.squares

    def of_meeting(self, kept, cotangents):
        inside.append(list(self.moving))
        result = own(self, kept, cotangents)
        inside.pop()
        return result

    monkeypatch.setattr(squares.RowMeeting, "squares", of_meeting)
    spy(routes.Repeated, "flat", "features")
    spy(squares, "gram_squares", "gram")
    spy(squares, "conv_squares", "windows")
    spy(squares, "pair_squares", "pairs")
    spy(routes.Product, "squares", "rows")
    spy(squares.RowMeeting, "gradient", "rows")
    spy(_row_gradients.Pass, "_factors", "pairs", moving)
    spy(_row_gradients.Pass, "by_meeting", "together", lambda left, _, keys: moving(left, *keys))
    return found


@pytest.mark.parametrize("name", CASES)
def test_routes_are_those_that_run(name, ran):
    loss_fn, params, batch, expected = CASES[name]
    explanation = explain(loss_fn)(params, batch)
    expected = {f"['{path}']": pair for path, pair in expected.items()}
    assert told(explanation) == expected
    ran.clear()
    jax.make_jaxpr(squared_norms(loss_fn))(params, batch)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert {names[k]: found for k, found in ran.items()} == {
        path: {route} for path, (_, route) in expected.items()
    }


def test_of_single_rows_all_norms_wait(ran):
    loss_fn, params, batch, _ = CASES["tied"]
    explanation = explain(loss_fn, per_example=True)(params, batch)
    assert told(explanation) == {"['table']": (2, "together"), "['w']": (1, "together")}
    ran.clear()
    jax.make_jaxpr(squared_norms(loss_fn, per_example=True))(params, batch)
    assert list(ran.values()) == [{"together"}] * 2


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_programs(name, per_example):
    """FLOPs of the whole programs, and bytes of what waits in them."""
    loss_fn, params, batch, _ = CASES[name]
    if per_example and name in ("convolution", "sorted_rows", "layers_in_a_loop", "in_a_branch"):
        pytest.skip("written for a batch")
    options = {"per_example": per_example}
    norms = explain(loss_fn, **options)(params, batch).norms

    def factors(params, batch):
        defaults = {"argnums": 0, "batch_argnums": 1, "has_aux": False, "loss_reduction": "mean"}
        loss, arrays = trace_rows(loss_fn, (params, batch), {}, **defaults, **options)
        return row_pass(loss, arrays, None, at_once=True).factors

    leaves = jax.tree.leaves(jax.eval_shape(factors, params, batch))
    assert norms.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert norms.bytes <= sum(norm.bytes for norm in norms.parameters)

    def count(function, *args):
        return flops(jax.make_jaxpr(function)(*args).jaxpr)

    assert norms.flops == pytest.approx(count(squared_norms(loss_fn, **options), params, batch))
    clipped = value_and_clipped_grad(loss_fn, 1.0, **options)
    assert norms.clipped_flops == pytest.approx(count(clipped, params, batch))
