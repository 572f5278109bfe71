"""What a step with dots sends over a mesh, beside the plain step with the validation gradient.

Activations are larger than parameters, as they are where parameters are sharded.
"""

import collections
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from tests.dots.checks import draw, expected_dots, mean_squares

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


@pytest.mark.parametrize("step", [early, late])
@pytest.mark.parametrize("layout", LAYOUTS)
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
