"""What a step with dots sends over a mesh, beside the plain step with the validation gradient.

Activations are larger than parameters, as they are where parameters are sharded.
"""

import collections
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import directions, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import draw, mean_squares
from tests.dots.checks import expected_dots
from tests.variants import crossed

WIDTH, HIDDEN, B, T = 16, 32, 24, 64
PARAMS = {
    "scale": draw(WIDTH),
    "first": draw(WIDTH, HIDDEN) / 4,
    "bias": draw(HIDDEN),
    "second": draw(HIDDEN, WIDTH) / 4,
}
X, VAL = draw(B, T, WIDTH, seed=1), draw(B, T, WIDTH, seed=2)
ROWS = PartitionSpec("data")
LAYOUTS = {
    "replicated": {},
    "fsdp": {"first": PartitionSpec("data"), "second": PartitionSpec(None, "data")},
    "tensor": {
        "first": PartitionSpec(None, "model"),
        "bias": PartitionSpec("model"),
        "second": PartitionSpec("model"),
    },
    "fsdp_and_tensor": {
        "first": PartitionSpec("data", "model"),
        "bias": PartitionSpec("model"),
        "second": PartitionSpec("model", "data"),
    },
}


def losses(params, x):
    """A residual block, whose rows stay on their device."""
    h = jnp.tanh((x * params["scale"][None, None]) @ params["first"] + params["bias"][None, None])
    return mean_squares(h @ params["second"] + x)


def loss_fn(params, x):
    return jnp.mean(losses(params, x))


def plain(params, x, val):
    return jax.grad(loss_fn)(params, x), jax.grad(loss_fn)(params, val)


def early(params, x, val):
    direction = jax.grad(loss_fn)(params, val)
    result = value_grad_and_dots(loss_fn)(params, x, direction=direction)
    return result.grads, direction, result.dots


def late(params, x, val):
    _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
    direction = jax.grad(loss_fn)(params, val)
    return grads, direction, dots(direction)


def compiled(step, layout, kind=AxisType.Auto):
    """And its arguments."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    shardings = {
        name: NamedSharding(mesh, LAYOUTS[layout].get(name, PartitionSpec())) for name in PARAMS
    }
    rows = NamedSharding(mesh, ROWS)
    args = jax.device_put((PARAMS, X, VAL), (shardings, rows, rows))
    outputs = (shardings, shardings) if step is plain else (shardings, shardings, rows)
    return jax.jit(step, out_shardings=outputs).lower(*args).compile(), args


def traffic(found):
    """Bytes by kind."""
    totals = collections.Counter()
    for collective in found:
        totals[collective.kind] += collective.bytes
    return totals


@pytest.fixture(scope="module")
def expected():
    grads = jax.jit(jax.grad(loss_fn))
    direction = grads(PARAMS, VAL)
    return grads(PARAMS, X), direction, expected_dots(losses, PARAMS, X, direction)


# Bytes on one device. The direction is gathered where the parameter itself is. A product that is
# split over its inputs is summed, as it is in the forward pass, and so are the dots behind it.
MATRICES = 4 * 2 * WIDTH * HIDDEN
SUMMED = 4 * (B // 4) * (T * WIDTH + 2)
ADDED = {
    "replicated": {},
    "fsdp": {"all-gather": MATRICES},
    "tensor": {"all-reduce": SUMMED},
    "fsdp_and_tensor": {"all-gather": MATRICES // 2, "all-reduce": SUMMED},
}


@pytest.mark.parametrize(("layout", "step"), crossed(LAYOUTS, [early, late]))
def test_what_dots_add(layout, step, expected):
    own, args = compiled(step, layout)
    found = own(*args)
    testing.assert_dots_close(found, expected)
    for direction, dots in zip(found[1].values(), found[2].values()):
        assert dots.sharding.is_equivalent_to(NamedSharding(direction.sharding.mesh, ROWS), 1)
    collectives = testing.collectives(own)
    floor = testing.collectives(compiled(plain, layout)[0])
    assert traffic(collectives) - traffic(floor) == ADDED[layout]
    largest = max(leaf.size for leaf in PARAMS.values())
    for collective in collectives:
        if collective.kind == "all-gather":
            assert all(math.prod(shape) <= largest for shape in collective.shapes)
        assert all(shape[:1] != (B,) for shape in collective.shapes)  # nothing has all rows


def test_explicit_axes_send_the_same(expected):
    own, args = compiled(early, "replicated", AxisType.Explicit)
    testing.assert_dots_close(own(*args), expected)
    floor = testing.collectives(compiled(plain, "replicated", AxisType.Explicit)[0])
    assert traffic(testing.collectives(own)) == traffic(floor)


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_directions_lie_like_parameters(layout, expected, standard_promotion):
    """A whole step, that says nowhere how its results are to be split; several directions."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = {
        name: NamedSharding(mesh, LAYOUTS[layout].get(name, PartitionSpec())) for name in PARAMS
    }
    rows = NamedSharding(mesh, ROWS)
    params, x, val = jax.device_put((PARAMS, X, VAL), (shardings, rows, rows))

    def step(params, state, x, val):
        _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
        val_grads = jax.grad(loss_fn)(params, val)
        direction = directions.through_optimizer(TX, state, params, grads, val_grads)
        updates, state = TX.update(grads, state, params)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), val_grads, direction)
        return optax.apply_updates(params, updates), direction, dots(stacked)

    state = jax.jit(TX.init)(params)
    own = jax.jit(step).lower(params, state, x, val).compile()
    after, direction, dots = own(params, state, x, val)
    testing.assert_dots_close({name: leaf[0] for name, leaf in dots.items()}, expected[2])
    products = expected_dots(losses, PARAMS, X, jax.device_get(direction))
    testing.assert_dots_close({name: leaf[1] for name, leaf in dots.items()}, products)
    by_row = NamedSharding(mesh, PartitionSpec(None, "data"))
    for name, sharding in shardings.items():
        ndim = PARAMS[name].ndim
        assert direction[name].sharding.is_equivalent_to(sharding, ndim)
        assert after[name].sharding.is_equivalent_to(sharding, ndim)
        assert dots[name].sharding.is_equivalent_to(by_row, 2)
    for collective in testing.collectives(own):
        assert all(shape[:1] != (B,) for shape in collective.shapes)
        if collective.kind == "all-gather":  # both directions at once, where parameters are split
            assert layout.startswith("fsdp")
            assert collective.bytes <= 2 * 4 * WIDTH * HIDDEN


@pytest.mark.parametrize("form", [early, late])
def test_a_loop_gathers_one_layer_at_a_time(form):
    layers = 3
    params = {"w": draw(layers, WIDTH, WIDTH) / 4}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = NamedSharding(mesh, ROWS)

    def row_losses(params, x):
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["w"])
        return mean_squares(h)

    def step(params, x, direction):
        if form is early:
            result = value_grad_and_dots(mean_of_rows)(params, x, direction=direction)
            return result.grads, result.dots
        _, grads, dots = value_and_dots_fn(mean_of_rows)(params, x)
        return grads, dots(direction)

    def mean_of_rows(params, x):
        return jnp.mean(row_losses(params, x))

    args = jax.device_put((params, X, params), ({"w": split}, rows, {"w": split}))
    own = jax.jit(step, out_shardings=({"w": split}, rows)).lower(*args).compile()
    products = expected_dots(row_losses, params, X, params)
    testing.assert_dots_close(own(*args)[1], products)
    gathered = [found for found in testing.collectives(own) if found.kind == "all-gather"]
    assert gathered
    for collective in gathered:
        assert all(math.prod(shape) <= WIDTH * WIDTH for shape in collective.shapes)


class Program:
    """With the text of a program that was compiled for a GPU or a TPU."""

    def __init__(self, text):
        self.as_text = lambda: text


@pytest.mark.parametrize(
    ("line", "kind", "shapes", "size"),
    [
        ("%a = f32[4,2]{1,0} all-reduce(%b), channel_id=1", "all-reduce", ((4, 2),), 32),
        ("%a = (bf16[3]{0}, s32[]) all-to-all(%b, %c)", "all-to-all", ((3,), ()), 10),
        ("%a = f8e4m3fn[8]{0:T(8)} all-gather(%b)", "all-gather", ((8,),), 8),
        ("%a = pred[2]{0} collective-permute(%b)", "collective-permute", ((2,),), 2),
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%b)", "all-gather", ((8,),), 32),
        ("%a = f32[2]{0} all-reduce-start(%b)", "all-reduce", ((2,),), 8),
    ],
    ids=["one", "tuple", "f8", "pred", "start", "reduce-start"],
)
def test_lines_of_hlo(line, kind, shapes, size):
    program = Program(f"  {line}\n  %d = f32[2]{{0}} all-gather-done(%a)\n")
    assert testing.collectives(program) == [testing.Collective(kind, shapes, size)]
