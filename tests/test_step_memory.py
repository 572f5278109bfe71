"""What explain says of memory and collectives, beside what XLA says of the compiled step."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import explain, testing, value_and_dots_fn, value_grad_and_dots
from ghostjax._step_memory import StepMemory
from tests.dots import test_collectives as blocks
from tests.dots.models import MODELS

MIB = 2**20


def early(loss_fn, params, batch, direction):
    result = value_grad_and_dots(loss_fn)(params, batch, direction=direction)
    return result.grads, result.dots


def late(loss_fn, params, batch, direction):
    _, grads, dots = value_and_dots_fn(loss_fn)(params, batch)
    return grads, dots(direction)


def plain(loss_fn, params, batch, direction):
    return jax.grad(loss_fn)(params, batch)


def compiled(form, loss_fn, args, out_shardings=None):
    step = jax.jit(functools.partial(form, loss_fn), out_shardings=out_shardings)
    return step.lower(*args).compile()


def on_mesh(layout, kind=AxisType.Auto):
    """Shapes of the arguments of ``early``, and shardings of its results."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = blocks.LAYOUTS[layout]
    shardings = {
        name: NamedSharding(mesh, specs.get(name, PartitionSpec())) for name in blocks.PARAMS
    }
    rows = NamedSharding(mesh, blocks.ROWS)

    def shape(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(shape, blocks.PARAMS, shardings)
    return (params, shape(blocks.X, rows), params), (shardings, rows)


def assert_near(estimate, found, factor=1.5):
    assert found / factor <= estimate <= found * factor


@pytest.mark.parametrize("layout", blocks.LAYOUTS)
def test_on_meshes(layout):
    args, outputs = on_mesh(layout)
    memory = explain(blocks.loss_fn)(*args[:2]).memory
    assert memory.mesh == {"data": 4, "model": 2}
    base = blocks.traffic(testing.collectives(compiled(plain, blocks.loss_fn, args, outputs[0])))
    for form, scratch, sent in (
        (early, memory.scratch, memory.sent),
        (late, memory.late_scratch, memory.late_sent),
    ):
        step = compiled(form, blocks.loss_fn, args, outputs)
        xla = step.memory_analysis()
        arguments = memory.parameters + memory.data + memory.direction
        assert arguments == xla.argument_size_in_bytes
        dots = 4 * blocks.B // 4 * len(blocks.PARAMS)
        assert memory.gradient + dots <= xla.output_size_in_bytes <= memory.gradient + 2 * dots
        assert_near(scratch, xla.temp_size_in_bytes)
        assert sent == blocks.traffic(testing.collectives(step)) - base == blocks.ADDED[layout]


def test_explicit_axes():
    args, _ = on_mesh("replicated", AxisType.Explicit)
    automatic, _ = on_mesh("replicated")
    assert (
        explain(blocks.loss_fn)(*args[:2]).memory == explain(blocks.loss_fn)(*automatic[:2]).memory
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt2_scan", "gpt2_scan_remat", "cnn"])
def test_on_one_device(name, standard_promotion):
    row_losses, params, batch = MODELS[name]()

    def loss_fn(params, batch):
        return jnp.mean(row_losses(params, batch))

    memory = explain(loss_fn)(params, batch).memory
    assert memory.mesh == memory.sent == memory.late_sent == {}
    for form, scratch in ((early, memory.scratch), (late, memory.late_scratch)):
        xla = compiled(form, loss_fn, (params, batch, params)).memory_analysis()
        assert_near(scratch, xla.temp_size_in_bytes, 2)


def test_directions_are_counted():
    args, _ = on_mesh("fsdp")
    one, three = (
        explain(blocks.loss_fn, directions=count)(*args[:2]).memory for count in (None, 3)
    )
    assert three.direction == 3 * one.direction
    assert three.sent["all-gather"] == 3 * one.sent["all-gather"]
    assert (three.parameters, three.data, three.gradient) == (
        one.parameters,
        one.data,
        one.gradient,
    )


def test_a_budget():
    args, _ = on_mesh("tensor")
    explained = functools.partial(explain, blocks.loss_fn, directions=3)
    memory = explained()(*args[:2]).memory
    assert explained()(*args[:2]).fits is None  # a CPU does not say what it has
    enough = explained(budget=memory.bytes)(*args[:2])
    assert enough.fits
    assert "does not fit" not in str(enough).replace("value_and_dots_fn does not fit", "")
    small = explained(budget=memory.bytes - 1)(*args[:2])
    assert not small.fits
    assert "value_grad_and_dots does not fit into" in str(small)
    assert "take the batch in 2 parts, of 12 of the 24 rows" in str(small)
    assert "split parameters along 'data' of the mesh" in str(small)
    assert "take fewer directions at a time, each is" in str(small)


def memory_of(**given):
    names = ("parameters", "data", "direction", "gradient")
    sizes = dict.fromkeys((*names, "plain_scratch", "scratch", "late_scratch"), MIB)
    none = {"mesh": {}, "sent": {}, "late_sent": {}, "whole": ()}
    return StepMemory(**(sizes | none | given))


@pytest.mark.parametrize(
    ("memory", "budget", "expected"),
    [
        (memory_of(), 5 * MIB, []),
        (
            memory_of(late_scratch=3 * MIB),
            6 * MIB,
            [
                "value_and_dots_fn does not fit into 6.00 MiB, it needs 7.00 MiB: take "
                "value_grad_and_dots, or remat=True"
            ],
        ),
        (
            memory_of(scratch=7 * MIB),
            5 * MIB,
            [
                "value_grad_and_dots does not fit into 5.00 MiB, it needs 11.0 MiB:",
                "  take the batch in 4 parts, of 2 of the 8 rows, one after the other "
                "(jax.lax.scan)",
            ],
        ),
        (
            memory_of(),
            3 * MIB,
            [
                "value_grad_and_dots does not fit into 3.00 MiB, it needs 5.00 MiB:",
                "  split the parameters over more devices, or keep them in a narrower dtype",
            ],
        ),
    ],
    ids=["fits", "late", "parts", "parameters"],
)
def test_ways_out(memory, budget, expected):
    assert memory.lines(budget, num_rows=8, directions=1)[2:] == expected


def test_what_is_asked_for_must_make_sense():
    with pytest.raises(ValueError, match=r"budget must be a positive number of bytes, got 0"):
        explain(blocks.loss_fn, budget=0)
    (params, x, _), _ = on_mesh("replicated")
    other = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(other, PartitionSpec("rows")))
    with pytest.raises(ValueError, match=r"on one mesh, found .*'data': 4.* and .*'rows': 8"):
        explain(blocks.loss_fn)(params, x)
