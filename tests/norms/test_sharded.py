"""Norms, pairs and clipped gradients of rows on several devices."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import pairwise_dots, squared_norms, testing, value_and_clipped_grad
from models.arrays import draw, mean_squares
from tests.dots import test_collectives as blocks
from tests.dots.test_sharded import mesh_of

PARAMS = {"w": draw(8, 8) / 3, "v": draw(8, 3), "b": draw(1, 1, 3)}
X = draw(16, 4, 8, seed=1)
ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


def losses(params, x):
    h = jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"])
    return mean_squares(h @ params["v"] + params["b"])


FUNCTIONS = {
    "norms": squared_norms,
    "pairs": pairwise_dots,
    "clipped": lambda loss_fn: value_and_clipped_grad(loss_fn, 0.1),
}


@pytest.fixture(scope="module")
def expected():
    return {name: jax.jit(fn(losses))(PARAMS, X) for name, fn in FUNCTIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis_type"), [*itertools.product(FUNCTIONS, [AxisType.Auto, AxisType.Explicit])]
)
def test_rows_on_several_devices(name, axis_type, expected):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, ROWS))
        params = jax.device_put(PARAMS, NamedSharding(mesh, WHOLE))
        found = jax.jit(FUNCTIONS[name](losses))(params, x)
    testing.assert_dots_close(jax.device_get(found), jax.device_get(expected[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_of_shard_map_is_refused(name):
    options = {"mesh": mesh_of(AxisType.Auto), "in_specs": (WHOLE, ROWS), "out_specs": ROWS}
    loss_fn = jax.shard_map(losses, **options)
    with pytest.raises(NotImplementedError, match=r"meet inside of shard_map, .* Use jax.jit with"):
        jax.jit(FUNCTIONS[name](loss_fn))(PARAMS, X)


def inside(function, out_specs, check_vma):
    options = {"mesh": mesh_of(AxisType.Auto), "in_specs": (WHOLE, ROWS), "out_specs": out_specs}
    return jax.jit(jax.shard_map(function, check_vma=check_vma, **options))(PARAMS, X)


def added_up(params, x):
    return jax.lax.psum(value_and_clipped_grad(losses, 0.1)(params, x), "data")


@pytest.mark.slow
def test_inside_of_shard_map(expected):
    """What the error says."""
    found = inside(squared_norms(losses), ROWS, False)
    testing.assert_dots_close(found, expected["norms"])
    testing.assert_dots_close(inside(added_up, WHOLE, False), expected["clipped"])


@pytest.mark.parametrize("function", [squared_norms(losses), pairwise_dots(losses), added_up])
def test_inside_of_a_shard_map_that_checks(function):
    with pytest.raises(NotImplementedError, match=r"Pass check_vma=False"):
        inside(function, ROWS, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name"), [*itertools.product(blocks.LAYOUTS, ["norms", "clipped"])]
)
def test_no_row_is_sent(name, layout):
    """What is gathered is no larger than a parameter; but one number a row."""
    mesh = mesh_of(AxisType.Auto)
    specs = blocks.LAYOUTS[layout]
    shardings = {key: NamedSharding(mesh, specs.get(key, WHOLE)) for key in blocks.PARAMS}
    x = jax.device_put(blocks.X, NamedSharding(mesh, ROWS))
    params = jax.device_put(blocks.PARAMS, shardings)
    function = jax.jit(FUNCTIONS[name](blocks.losses))
    compiled = function.lower(params, x).compile()
    testing.assert_dots_close(compiled(params, x), function(blocks.PARAMS, blocks.X))
    largest = max(leaf.size for leaf in blocks.PARAMS.values())
    shapes = [
        (found.kind, shape) for found in testing.collectives(compiled) for shape in found.shapes
    ]
    assert all(math.prod(shape) <= largest for kind, shape in shapes if kind == "all-gather")
    assert all(shape[:1] != (blocks.B,) for _, shape in shapes)


def convolved(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


def of_images(params, x):
    return mean_squares(convolved(x[..., None], params["w"]))


def of_images_in_a_loop(params, x):
    h = x.reshape(x.shape[0], 4, 3, 8)
    return mean_squares(
        jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(convolved(h, params["w"])), h)
    )


def of_tied_tables(params, x):
    ids = (10 * jnp.abs(x[..., 0])).astype(jnp.int32)
    return mean_squares(jnp.tanh(params["w"][ids]) @ params["w"].T)


def of_repeated(params, x):
    """A table that is small beside the positions, tied; layers in a loop; a matrix used twice."""
    ids = (2 * jnp.abs(x[..., 0])).astype(jnp.int32)

    def layer(h, of_layer):
        return h + jnp.tanh(h @ of_layer["w"] + of_layer["b"][None, None]), None

    h, _ = jax.lax.scan(layer, params["table"][ids], params["layers"])
    h = jnp.tanh(jnp.tanh(h @ params["w"]) @ params["w"])
    return mean_squares(h @ params["table"].T)


REPEATED = {
    "table": draw(4, 4),
    "layers": {"w": draw(2, 4, 4) / 2, "b": draw(2, 4)},
    "w": draw(4, 4) / 2,
}

# By loops of their own: convolutions, pairs of positions of one use and of several; and the
# gradient of a row put together from all uses, also of a kernel: as that of a convolution with a
# kernel for each row, XLA (jax 0.10) makes wrong numbers of it on eight devices.
LOOPS = {
    "repeated": (of_repeated, REPEATED),
    "convolution": (of_images, {"w": draw(3, 3, 1, 4)}),
    "convolutions": (of_images_in_a_loop, {"w": draw(3, 3, 8, 8) / 8}),
    "tied": (of_tied_tables, {"w": draw(64, 8)}),
    "pairs": (lambda params, x: mean_squares(x[..., :2] @ params["w"]), {"w": draw(2, 64)}),
    "row_by_row": (lambda params, x: mean_squares(x @ params["w"]), {"w": draw(8, 2)}),
}


@pytest.mark.parametrize(
    ("name", "per_example"), [*((name, False) for name in LOOPS), ("convolutions", True)]
)
def test_loops_over_rows_stay_on_their_devices(name, per_example):
    row_losses, params = LOOPS[name]
    loss_fn = (lambda params, x: row_losses(params, x[None])[0]) if per_example else row_losses
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(draw(16, 12, 8, seed=3), NamedSharding(mesh, ROWS))
    params = jax.device_put(params, NamedSharding(mesh, WHOLE))
    norms = jax.jit(squared_norms(loss_fn, per_example=per_example))
    compiled = norms.lower(params, x).compile()
    assert testing.collectives(compiled) == []
    grads = testing.per_example_grads(row_losses, *jax.device_get((params, x)))
    squares = jax.tree.map(lambda leaf: jnp.square(leaf).reshape(16, -1).sum(1), grads)
    testing.assert_dots_close(compiled(params, x), squares)


def test_clipped_gradients_of_kernels_by_vectorized_rows():
    """Each row has a gradient of its own in the second pass, too: as that of a convolution it would
    be wrong on eight devices."""

    def row_loss(params, x):
        return of_images_in_a_loop(params, x[None])[0]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, x = {"w": draw(3, 3, 8, 8) / 8}, draw(16, 12, 8, seed=3)
    grads = testing.per_example_grads(of_images_in_a_loop, params, x)["w"]
    norms = jnp.linalg.norm(grads.reshape(16, -1), axis=1)
    most = float(jnp.median(norms))
    expected = jnp.einsum("b,b...->...", jnp.minimum(1, most / norms), grads) / 16
    clipped = jax.jit(value_and_clipped_grad(row_loss, most, per_example=True))
    x = jax.device_put(x, NamedSharding(mesh, ROWS))
    _, found = clipped(jax.device_put(params, NamedSharding(mesh, WHOLE)), x)
    testing.assert_dots_close(jax.device_get(found["w"]), expected)


def test_rows_that_only_jit_places():
    """Of these no type tells the mesh: XLA says where they are, merged with positions or not."""

    key = jax.random.key(0)

    def row_losses(params, x, key):
        w = params["w"] * jax.random.uniform(key, (4, 4))
        h = jnp.tanh(jnp.tanh(x @ w) @ w)
        return mean_squares(jnp.tanh(h.reshape(-1, 4) @ w).reshape(x.shape))

    params, x = {"w": draw(4, 4) / 2}, draw(16, 24, 4, seed=3)
    mesh = mesh_of(AxisType.Auto)
    places = [NamedSharding(mesh, spec) for spec in (WHOLE, ROWS, WHOLE)]
    norms = jax.jit(squared_norms(row_losses), in_shardings=places)
    compiled = norms.lower(params, x, key).compile()
    assert testing.collectives(compiled) == []
    found = compiled(*jax.device_put([params, x, key], places))
    assert found["w"].sharding.is_equivalent_to(places[1], 1)
    expected = jax.jit(squared_norms(row_losses))(params, x, key)
    testing.assert_dots_close(jax.device_get(found), expected)


@pytest.mark.slow
def test_rows_that_devices_share():
    """Where rows are merged with positions, devices may have parts of them."""
    mesh = mesh_of(AxisType.Auto)

    def row_losses(params, x):
        h = jax.lax.with_sharding_constraint(x.reshape(-1, 4), NamedSharding(mesh, ROWS))
        return mean_squares(jnp.tanh(jnp.tanh(h @ params["w"]) @ params["w"]).reshape(x.shape))

    params, x = {"w": draw(4, 4) / 2}, draw(3, 24, 4, seed=3)
    found = jax.jit(squared_norms(row_losses))(params, x)
    grads = testing.per_example_grads(row_losses, params, x)
    testing.assert_dots_close(found["w"], jnp.square(grads["w"]).reshape(3, -1).sum(1))


@pytest.mark.parametrize("name", ["norms", "clipped"])
def test_a_row_put_together_stays_where_it_is(name):
    """Its features, too, where parameters are split over a second axis of the mesh."""
    mesh = mesh_of(AxisType.Auto)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), REPEATED)
    shardings["table"] = NamedSharding(mesh, PartitionSpec("model"))
    x = draw(16, 24, 8, seed=3)
    args = jax.device_put((REPEATED, x), (shardings, NamedSharding(mesh, ROWS)))
    function = jax.jit(FUNCTIONS[name](of_repeated))
    compiled = function.lower(*args).compile()
    found, sent = compiled(*args), testing.collectives(compiled)
    testing.assert_dots_close(jax.device_get(found), jax.device_get(function(REPEATED, x)))
    assert all(shape[:1] != (16,) for own in sent for shape in own.shapes)  # nothing has all rows
    if name == "norms":
        assert {own.kind for own in sent} == {"all-reduce"}
        for leaf in jax.tree.leaves(found):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, ROWS), 1)
