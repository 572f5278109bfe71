"""Rows and features that only ``in_shardings`` of ``jax.jit`` place: no type tells where they are.

Rows are split over one axis of the mesh, features over the other. Norms and clipped gradients
gather nothing that the plain step does not, and nothing has all rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import squared_norms, testing, value_and_clipped_grad
from ghostjax.core.by_devices import by_devices
from ghostjax.core.row_blocks import map_rows
from models.arrays import draw, mean_squares
from tests.dots.test_sharded import ROWS, mesh_of

B, T, F, H = 24, 16, 16, 32
X = draw(B, T, F, seed=1)
P = PartitionSpec


def mlp(params, x):
    h = jnp.tanh(x @ params["first"] + params["bias"][None, None])
    return mean_squares(h @ params["second"] + x)


def attention(params, x):
    q, k, v = (jnp.einsum("btf,fhd->bthd", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    h = jnp.einsum("bhts,bshd->bthd", weights, v)
    return mean_squares(jnp.einsum("bthd,hdf->btf", h, params["out"]) + x)


def tied(params, x):
    h = params["table"][(10 * jnp.abs(x[..., 0])).astype(jnp.int32)]
    h = h + jnp.tanh(h @ params["first"]) @ params["second"]
    return mean_squares(h @ params["table"].T)


def convolved(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


def convolutions(params, x):
    h = jnp.tanh(convolved(x.reshape(-1, 4, 4, F), params["first"]))
    return mean_squares(convolved(h, params["second"]))


def layers(params, x):
    def layer(h, own):
        return h + jnp.tanh(h @ own["first"]) @ own["second"], None

    return mean_squares(jax.lax.scan(layer, x, params)[0])


FIRST, SECOND = draw(F, H) / 4, draw(H, F) / 4
BLOCK = {"first": P(None, "model"), "second": P("model")}
# Row losses, parameters, how these are split.
MODELS = {
    "mlp": (
        mlp,
        {"first": FIRST, "bias": draw(H), "second": SECOND},
        BLOCK | {"bias": P("model")},
    ),
    "attention": (
        attention,
        {name: draw(F, 4, 4, seed=k) / 4 for k, name in enumerate("qkv")}
        | {"out": draw(4, 4, F) / 4},
        dict.fromkeys("qkv", P(None, "model")) | {"out": P("model")},
    ),
    "tied": (
        tied,
        {"table": draw(64, F), "first": FIRST, "second": SECOND},
        BLOCK | {"table": P("model")},
    ),
    "convolutions": (
        convolutions,
        {"first": draw(3, 3, F, H) / 10, "second": draw(3, 3, H, F) / 10},
        {"first": P(None, None, None, "model"), "second": P(None, None, "model")},
    ),
    "layers": (
        layers,
        {"first": draw(2, F, H) / 4, "second": draw(2, H, F) / 4},
        {"first": P(None, None, "model"), "second": P(None, "model")},
    ),
}


def squares_of(grads):
    return jax.tree.map(lambda leaf: jnp.square(leaf).reshape(B, -1).sum(1), grads)


ARGS = {row_losses: (params, X) for row_losses, params, _ in MODELS.values()}


def of_one(row_losses, params, x):
    return row_losses(params, x[None])[0]


def norms(row_losses, per_example):
    loss_fn = functools.partial(of_one, row_losses) if per_example else row_losses
    grads = testing.per_example_grads(row_losses, *ARGS[row_losses])
    return squared_norms(loss_fn, per_example=per_example), squares_of(grads)


def clipped(row_losses, per_example):
    loss_fn = functools.partial(of_one, row_losses) if per_example else row_losses
    grads = testing.per_example_grads(row_losses, *ARGS[row_losses])
    sizes = jnp.sqrt(sum(jax.tree.leaves(squares_of(grads))))
    limit = float(jnp.median(sizes))
    factors = jnp.minimum(1, limit / sizes)
    if per_example:  # of the mean; of row losses, of their sum
        factors = factors / B
    expected = jax.tree.map(lambda leaf: jnp.einsum("b,b...->...", factors, leaf), grads)
    function = value_and_clipped_grad(loss_fn, limit, per_example=per_example)
    return lambda *args: function(*args)[1], expected


def gathered(compiled):
    """Shapes without axes of one entry."""
    return {
        tuple(size for size in shape if size > 1)
        for own in testing.collectives(compiled)
        for shape in own.shapes
        if own.kind != "all-reduce"
    }


QUICK = {("tied", norms, False), ("convolutions", norms, False), ("mlp", norms, True)}
VARIANTS = [
    pytest.param(
        *variant,
        id=f"{variant[0]}-{variant[1].__name__}{'-per_example' if variant[2] else ''}",
        marks=[] if variant in QUICK else pytest.mark.slow,
    )
    for variant in ((m, f, p) for m in MODELS for f in (norms, clipped) for p in (False, True))
]


@pytest.mark.parametrize(("name", "kind", "per_example"), VARIANTS)
def test_nothing_is_gathered(name, kind, per_example):
    row_losses, params, specs = MODELS[name]
    mesh = mesh_of(AxisType.Auto)
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    places = shardings, NamedSharding(mesh, ROWS)
    function, expected = kind(row_losses, per_example)

    def plain(params, x):
        return jax.value_and_grad(lambda params: jnp.mean(row_losses(params, x)))(params)

    def compiled(function):
        return jax.jit(function, in_shardings=places).lower(params, X).compile()

    own = compiled(function)
    found = own(*jax.device_put((params, X), places))
    testing.assert_dots_close(jax.device_get(found), jax.device_get(expected))
    assert gathered(own) <= gathered(compiled(plain))
    for collective in testing.collectives(own):
        assert all(B not in shape for shape in collective.shapes)
    if kind is norms:
        for leaf in jax.tree.leaves(found):
            assert leaf.sharding.is_equivalent_to(places[1], 1)


def test_features_that_are_split_of_data():
    """Where inputs' and outputs' features lie along one axis of the mesh, one of them moves, in the
    plain step as here; and no more than it."""
    mesh = mesh_of(AxisType.Auto)
    places = {key: NamedSharding(mesh, spec) for key, spec in MODELS["mlp"][2].items()}
    places = places, NamedSharding(mesh, P("data", None, "model"))
    function, expected = norms(mlp, per_example=True)
    own = jax.jit(function, in_shardings=places).lower(MODELS["mlp"][1], X).compile()
    found = own(*jax.device_put((MODELS["mlp"][1], X), places))
    testing.assert_dots_close(jax.device_get(found), jax.device_get(expected))
    assert all(math.prod(shape) <= X.size // 4 for shape in gathered(own))


def test_export_for_several_devices():
    mesh = mesh_of(AxisType.Auto)
    row_losses, params, specs = MODELS["convolutions"]
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    places = shardings, NamedSharding(mesh, ROWS)
    function, expected = norms(row_losses, per_example=False)
    exported = jax.export.export(jax.jit(function, in_shardings=places))(params, X)
    assert exported.nr_devices == mesh.size
    found = exported.call(*jax.device_put((params, X), places))
    testing.assert_dots_close(jax.device_get(found), jax.device_get(expected))


def one(x):
    return [jnp.sin(x)]


def several(devices, x):
    return [jnp.full_like(x, devices)]


def test_the_way_is_that_of_the_program():
    """Not that of the machine, which has eight devices here."""

    def either(x):
        return by_devices(one, several, [x])[0]

    x, rows = draw(8), NamedSharding(jax.make_mesh((4,), ("data",)), ROWS)
    alone, split = jax.jit(either), jax.jit(either, in_shardings=rows)
    testing.assert_dots_close(either(x), jnp.sin(x))
    testing.assert_dots_close(alone(x), jnp.sin(x))
    testing.assert_dots_close(jax.vmap(either)(x[:, None])[:, 0], jnp.sin(x))
    assert jax.device_get(split(x)).tolist() == [4.0] * 8
    testing.assert_dots_close(jax.grad(lambda x: jnp.sum(alone(x)))(x), jnp.cos(x))
    assert "custom_partitioning" not in split.lower(x).as_text().lower()


def test_wide_numbers_are_lowered_as_they_were_traced():
    """Where lowering is outside of the context that makes numbers wide."""

    def squares(x):
        return map_rows(lambda row: jnp.sum(jnp.square(row.T @ row)), x)

    rows = NamedSharding(mesh_of(AxisType.Auto), ROWS)
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        traced = jax.jit(squares, in_shardings=rows).trace(x)
    compiled = traced.lower().compile()
    with jax.enable_x64(True):
        found = jax.device_get(compiled(jax.device_put(x, rows)))
    assert found.dtype == np.float64
    products = np.einsum("bti,bto->bio", x, x)
    expected = np.square(products).sum((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-14)
