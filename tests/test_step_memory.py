"""What explain says of memory and collectives, beside what XLA says of the compiled step."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import explain, testing, value_and_dots_fn, value_grad_and_dots
from ghostjax._memory import needs
from ghostjax._step_memory import StepMemory, in_bytes
from models.arrays import mean_squares
from models.flax import MODELS
from tests.dots import test_collectives as blocks

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


@pytest.mark.slow
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


P = PartitionSpec


def feed_forward(params, x):
    return mean_squares(jnp.tanh(x @ params["first"]) @ params["second"] + x)


def gathering(params, x):
    return feed_forward(
        jax.tree.map(lambda w: jax.lax.all_gather(w, "data", tiled=True), params), x
    )


def summing(params, x):
    h = jnp.tanh(x @ params["first"]) @ params["second"]
    return mean_squares(jax.lax.psum(h, "model") + x)


def attending(params, x):
    q, k = x @ params["first"], x @ params["second"].T
    weights = jax.nn.softmax(jnp.einsum("btf,bsf->bts", q, k) / 4, axis=-1)
    return mean_squares(jnp.einsum("bts,bsf->btf", weights, q) @ params["second"] + x)


def normalized(params, x):
    for _ in range(2):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
        x = x + jax.nn.gelu(x @ params["first"]) @ params["second"]
    return mean_squares(x)


TENSOR = {"first": P(None, "model"), "second": P("model")}
# Bodies, how parameters are split, what shard_map takes of that, its options.
MAPPED = {
    "fsdp": (gathering, {name: P("data") for name in TENSOR}, P("data"), {"check_vma": False}),
    "tensor": (summing, TENSOR, TENSOR, {}),
    "some_axes": (feed_forward, TENSOR, P(), {"axis_names": {"data"}}),
    "attention": (attending, {name: P() for name in TENSOR}, P(), {}),
    "normalized": (normalized, {name: P() for name in TENSOR}, P(), {"check_vma": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPPED)
def test_shard_map(name):
    """Its body has what one device has, and says what is sent."""
    body, specs, inside, options = MAPPED[name]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    row_losses = jax.shard_map(
        body, mesh=mesh, in_specs=(inside, P("data")), out_specs=P("data"), **options
    )
    rows = NamedSharding(mesh, P("data"))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {
        name: jax.ShapeDtypeStruct(blocks.PARAMS[name].shape, jnp.float32, sharding=place)
        for name, place in shardings.items()
    }
    x = jax.ShapeDtypeStruct(blocks.X.shape, jnp.float32, sharding=rows)

    def loss_fn(params, x):
        return jnp.mean(row_losses(params, x))

    explained = explain(loss_fn)(params, x)
    base = compiled(plain, loss_fn, (params, x, params), shardings)
    step = compiled(early, loss_fn, (params, x, params), (shardings, rows))
    memory, sent = explained.memory, blocks.traffic(testing.collectives(step))
    sent -= blocks.traffic(testing.collectives(base))
    assert_near(memory.plain_scratch, base.memory_analysis().temp_size_in_bytes)
    assert_near(memory.scratch, step.memory_analysis().temp_size_in_bytes)
    step_late = compiled(late, loss_fn, (params, x, params), (shardings, rows))
    assert_near(memory.late_scratch, step_late.memory_analysis().temp_size_in_bytes)
    # With JAX 0.12 XLA counts up to an eighth more for "some_axes"; why is not known.
    for flops, program in ((explained.plain_flops, base), (explained.flops, step)):
        assert_near(flops / mesh.size, program.cost_analysis()["flops"], 1.15)
    if name == "fsdp":  # XLA gathers once what is gathered again
        assert memory.sent.keys() == sent.keys()
        assert memory.sent["all-gather"] >= sent["all-gather"]
    else:
        assert memory.sent == sent


def test_shard_map_of_arrays_on_no_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    row_losses = jax.shard_map(
        feed_forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    params = {name: blocks.PARAMS[name] for name in TENSOR}
    memory = explain(lambda params, x: jnp.mean(row_losses(params, x)))(params, blocks.X).memory
    assert memory.mesh == {}
    assert memory.data == blocks.X.nbytes


def test_explicit_axes():
    args, _ = on_mesh("replicated", AxisType.Explicit)
    automatic, _ = on_mesh("replicated")
    assert (
        explain(blocks.loss_fn)(*args[:2]).memory == explain(blocks.loss_fn)(*automatic[:2]).memory
    )


@pytest.mark.slow
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


def test_the_state_of_an_optimizer():
    """As optax places it: like the parameters, and a counter of its own."""
    (params, x, _), _ = on_mesh("fsdp_and_tensor")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    state = optax.adamw(1e-3).init(jax.device_put(blocks.PARAMS, shardings))
    found = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    without = explain(blocks.loss_fn)(params, x)
    explained = functools.partial(explain, blocks.loss_fn, optimizer=optax.adamw(1e-3))
    memory = explained()(params, x).memory
    assert memory.optimizer == found == 2 * memory.parameters + 4
    assert without.memory.optimizer == 0
    assert memory.bytes == without.memory.bytes + found
    assert memory.late_bytes == without.memory.late_bytes + found
    assert not explained(budget=without.memory.bytes)(params, x).fits
    enough = explained(budget=memory.late_bytes)(params, x)
    assert enough.fits
    assert "does not fit" not in str(enough)
    assert f", optimizer state {in_bytes(found)}, data" in str(enough)
    assert "optimizer state" not in str(without)


def test_a_state_that_is_not_like_the_parameters():
    """Adafactor's rows and columns are counted whole; one array is a tree, too."""
    (params, x, _), _ = on_mesh("fsdp")
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=16)
    memory = explain(blocks.loss_fn, optimizer=tx)(params, x).memory
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(blocks.PARAMS)))
    split = memory.parameters / sum(leaf.nbytes for leaf in blocks.PARAMS.values())
    assert whole * split < memory.optimizer <= whole
    w = jax.ShapeDtypeStruct((512,), jnp.float32)
    memory = explain(lambda w, x: jnp.mean(x @ w), optimizer=optax.sgd(0.1, momentum=0.9))
    assert memory(w, jnp.ones((4, 512))).memory.optimizer == 4 * 512


def memory_of(**given):
    names = ("parameters", "data", "direction", "gradient")
    sizes = dict.fromkeys((*names, "plain_scratch", "scratch", "late_scratch"), MIB)
    none = {"optimizer": 0, "mesh": {}, "sent": {}, "late_sent": {}, "whole": ()}
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
    with pytest.raises(TypeError, match=r"must be an optax.GradientTransformation, got dict"):
        explain(blocks.loss_fn, optimizer={})
    (params, x, _), _ = on_mesh("replicated")
    other = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(other, PartitionSpec("rows")))
    with pytest.raises(ValueError, match=r"on one mesh, found .*'data': 4.* and .*'rows': 8"):
        explain(blocks.loss_fn)(params, x)


def test_long_chains_of_cheap_operations_inside_of_shard_map():
    """Each with its operand twice: there are 2**1500 ways back."""

    def chain(x):
        for _ in range(1500):
            x = x + x
        return x

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    mapped = jax.shard_map(chain, mesh=mesh, in_specs=rows, out_specs=rows)
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x: jnp.sum(mapped(x)))(x).jaxpr
    # Parts of x, of the result, which is made again, and of the sum.
    assert needs(jaxpr, [(("data",),)], {"data": 8}).scratch <= 3 * 4 * 64 // 8
