"""Norms that explain tells: routes are those that run, FLOPs those that XLA counts."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import (
    _row_gradients,
    explain,
    squared_norms,
    value_and_clipped_grad,
    value_grad_and_dots,
)
from ghostjax._flops import flops
from ghostjax._norms import trace_rows
from ghostjax._row_gradients import row_pass
from ghostjax.core import routes, squares
from models import measured
from models.arrays import draw

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
    branches = lambda x: x @ p["small"], lambda x: x @ (2 * p["small"])
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
        dict.fromkeys("abw", (1, "together")),
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


@functools.cache
def explained(name, per_example=False):
    loss_fn, params, batch, _ = CASES[name]
    return explain(loss_fn, per_example=per_example)(params, batch)


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


@pytest.mark.quick(
    "dense",
    "many_positions",
    "convolution",
    "looked_up",
    "looked_up_often",
    "tied",
    "sums_of_parameters",
    "sorted_rows",
)
@pytest.mark.parametrize("name", CASES)
def test_routes_are_those_that_run(name, ran):
    loss_fn, params, batch, expected = CASES[name]
    expected = {f"['{path}']": pair for path, pair in expected.items()}
    assert told(explained(name)) == expected
    ran.clear()
    jax.make_jaxpr(squared_norms(loss_fn))(params, batch)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert {names[k]: found for k, found in ran.items()} == {
        path: {route} for path, (_, route) in expected.items()
    }


def test_of_single_rows_all_norms_wait(ran):
    loss_fn, params, batch, _ = CASES["tied"]
    explanation = explained("tied", per_example=True)
    assert told(explanation) == {"['table']": (2, "together"), "['w']": (1, "together")}
    ran.clear()
    jax.make_jaxpr(squared_norms(loss_fn, per_example=True))(params, batch)
    assert list(ran.values()) == [{"together"}] * 2


def count(function, *args):
    return flops(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.quick(
    "looked_up-False",
    "looked_up_often-False",
    "dense-False",
    "many_positions-False",
    "convolution-False",
    "sums_of_parameters-False",
    "sorted_rows-False",
)
@pytest.mark.parametrize(
    ("name", "per_example"), [*((name, False) for name in CASES), ("tied", True)]
)
def test_counts_are_those_of_the_programs(name, per_example):
    """FLOPs of the whole programs, and bytes of what waits in them."""
    loss_fn, params, batch, _ = CASES[name]
    options = {"per_example": per_example}
    norms = explained(name, per_example).norms

    def factors(params, batch):
        defaults = {"argnums": 0, "batch_argnums": 1, "has_aux": False, "loss_reduction": "mean"}
        loss, arrays = trace_rows(loss_fn, (params, batch), {}, **defaults, **options)
        return row_pass(loss, arrays, None, at_once=True).factors

    leaves = jax.tree.leaves(jax.eval_shape(factors, params, batch))
    assert norms.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert norms.bytes <= sum(norm.bytes for norm in norms.parameters)
    few = 5 * ROWS * LAYERS * len(norms.parameters)  # of loops, norms are added up
    own = count(squared_norms(loss_fn, **options), params, batch)
    assert norms.flops == pytest.approx(own, abs=few)
    own = count(value_and_clipped_grad(loss_fn, 1.0, **options), params, batch)
    assert norms.clipped_flops == pytest.approx(own, abs=few + 20 * ROWS)  # weights of rows


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_norms_beside_dots(name):
    loss_fn, params, batch, _ = CASES[name]

    def dots(norms):
        def function(params, batch, direction):
            fn = value_grad_and_dots(loss_fn, norms=norms)
            result = fn(params, batch, direction=direction)
            return result.value, result.grads, result.dots, result.squared_norms

        return count(function, params, batch, params)

    assert explained(name).norms.extra_flops == dots(norms=True) - dots(norms=False)


def unrolled(function, xs, *, batch_size=None):
    """``jax.lax.map``, as XLA counts one round of a loop."""
    del batch_size
    leaves, treedef = jax.tree.flatten(xs)
    found = [function(treedef.unflatten(row)) for row in zip(*leaves)]
    return jax.tree.map(lambda *own: jnp.stack(own), *found)


def perceptron():
    def loss_fn(layers, x):
        for w, b in layers:
            x = jnp.tanh(x @ w + b[None])
        return mean(x)

    return loss_fn, [(draw(256, 256) / 16, draw(256))] * 3, draw(64, 256)


def scanned():
    def loss_fn(p, x):
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + own["b"][None, None]), None

        return mean(jax.lax.scan(layer, x @ p["first"], p["layers"], unroll=True)[0])

    layers = {"w": draw(3, 128, 128) / 16, "b": draw(3, 128)}
    return loss_fn, {"first": draw(128, 128) / 16, "layers": layers}, draw(4, 32, 128)


def images():
    def convolution(x, w, **options):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=numbers, **options
        )

    def loss_fn(params, x):
        x = jnp.maximum(convolution(x, params[0]), 0)
        return mean(convolution(x, params[1], feature_group_count=2))

    return loss_fn, [draw(3, 3, 16, 64), draw(3, 3, 32, 64)], draw(4, 16, 16, 16)


def gpt():
    sizes = {"layers": 2, "features": 128, "heads": 4, "positions": 64, "vocabulary": 512}
    with jax.numpy_rank_promotion("allow"):
        row_losses, params, batch = measured.setup(4, **sizes)
    return (lambda params, batch: jnp.mean(row_losses(params, batch))), params, batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [perceptron, scanned, images, pytest.param(gpt, marks=pytest.mark.slow)]
)
def test_beside_xla(model, monkeypatch):
    with jax.numpy_rank_promotion("allow"):
        loss_fn, params, batch = model()
        norms = explain(loss_fn)(params, batch).norms
        monkeypatch.setattr(jax.lax, "map", unrolled)
        for function, found in (
            (squared_norms(loss_fn), norms.flops),
            (value_and_clipped_grad(loss_fn, 1.0), norms.clipped_flops),
        ):
            compiled = jax.jit(function).lower(params, batch).compile()
            assert found == pytest.approx(compiled.cost_analysis()["flops"], rel=0.03)


def test_parts_of_no_row_are_not_clipped():
    def loss_fn(params, x):
        return mean(x @ params["w"]) + 1e-3 * jnp.sum(jnp.square(params["w"]))

    explanation = explain(loss_fn)({"w": W}, X)
    assert explanation.clipped_cost is explanation.norms.clipped_flops is None
    assert "['w'] in add at " in explanation.norms.clipping_refused
    assert told(explanation) == {"['w']": (1, "pairs")}
    assert explanation.norms_cost > 0
    assert "value_and_clipped_grad  refused: clipped gradients are those of rows" in str(
        explanation
    )
