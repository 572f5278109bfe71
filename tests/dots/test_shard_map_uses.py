"""What else is asked of losses with ``jax.shard_map``, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ghostjax import (
    GradDotProdEngine,
    conservation_error,
    explain,
    testing,
    value_and_dots_fn,
    value_grad_and_dots,
)
from ghostjax._errors import RowAxisError
from models.arrays import direction_like
from tests.dots.checks import expected_dots
from tests.dots.test_shard_map import (
    BATCH,
    EIGHT,
    MESH,
    PARAMS,
    ROWS,
    TENSOR,
    WHOLE,
    B,
    embedded,
    hidden,
    looked_up,
    mapped,
    mean,
    mean_of_rows,
    rows_of,
    tensor,
    tensor_block,
)
from tests.variants import crossed

DIRECTION = direction_like(PARAMS)


def eager(loss_fn, **options):
    fn = value_grad_and_dots(loss_fn, **options)
    return lambda params, batch, direction: fn(params, batch, direction=direction)


def late(loss_fn, **options):
    fn = value_and_dots_fn(loss_fn, **options)
    return lambda params, batch, direction: fn(params, batch)[2].result(direction)


forms = pytest.mark.parametrize("form", [eager, late])
forms_and_checks = pytest.mark.parametrize(
    ("form", "check_vma"), crossed([eager, late], [True, False])
)


@pytest.fixture(scope="module")
def expected():
    return expected_dots(rows_of, PARAMS, BATCH, DIRECTION)


@pytest.mark.slow
@forms_and_checks
def test_weight_decay_inside(check_vma, form, expected):
    """Every device adds it to its loss; it belongs to no row, and is there once."""

    def inside(params, batch):
        decay = jax.lax.psum(sum(jnp.sum(jnp.square(params[k])) for k in "wv"), "model")
        return mean(mean_of_rows(tensor_block(params, looked_up(params, batch)))) + decay / 10

    loss_fn = mapped(inside, TENSOR, check_vma=check_vma)
    result = jax.jit(form(loss_fn))(PARAMS, BATCH, DIRECTION)
    testing.assert_dots_close(result.dots, expected)
    shared = {k: np.vdot(PARAMS[k], DIRECTION[k]) / 5 if k in ("w", "v") else 0.0 for k in PARAMS}
    testing.assert_dots_close(result.shared, shared)
    assert max(jax.tree.leaves(conservation_error(result, DIRECTION))) <= 1e-5


@forms_and_checks
def test_one_row_at_a_time(check_vma, form):
    """The loss of one row, whose features are split."""
    names = ("w", "b", "v")
    run = mapped(
        lambda params, x: jnp.mean(jnp.square(tensor_block(params, x[None]))),
        {name: TENSOR[name] for name in names},
        P(),
        axis_names={"model"},
        check_vma=check_vma,
    )
    params, direction = ({k: tree[k] for k in names} for tree in (PARAMS, DIRECTION))
    found = jax.jit(form(run, per_example=True))(params, BATCH["x"], direction)

    def rows(params, x):
        return mean_of_rows(hidden(params, x) @ params["v"] + x)

    testing.assert_dots_close(found.dots, expected_dots(rows, params, BATCH["x"], direction))


@pytest.mark.parametrize(
    ("sizes", "form", "check_vma"), crossed([(8, 1), (1, 2)], [late, eager], [True, False])
)
def test_an_axis_of_one_device(sizes, check_vma, form, expected):
    devices = jax.devices()[: sizes[0] * sizes[1]]
    kinds = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=kinds, devices=devices)
    specs = TENSOR | {"emb": P()}

    def inside(params, batch):
        return mean(mean_of_rows(tensor_block(params, embedded(params, batch))))

    loss_fn = jax.shard_map(
        inside, mesh=mesh, in_specs=(specs, ROWS), out_specs=P(), check_vma=check_vma
    )
    found = jax.jit(form(loss_fn))(PARAMS, BATCH, DIRECTION).dots
    testing.assert_dots_close(found, expected)


@forms_and_checks
def test_on_an_explicit_mesh(check_vma, form, expected):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):

        def inside(params, batch):
            return mean(mean_of_rows(tensor_block(params, looked_up(params, batch))))

        loss_fn = jax.shard_map(inside, in_specs=(TENSOR, ROWS), out_specs=P(), check_vma=check_vma)

        def placed(tree, specs):
            return jax.tree.map(
                lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
            )

        batch = placed(BATCH, dict.fromkeys(BATCH, ROWS))
        params, direction = placed(PARAMS, TENSOR), placed(DIRECTION, TENSOR)
        found = jax.jit(form(loss_fn))(params, batch, direction).dots
    testing.assert_dots_close(found, expected)


@forms
def test_called_inside(form):
    """Of a parameter that is used whole and in parts, what devices have in parts is added up."""

    def loss_fn(params, batch, whole, own, total):
        x = embedded(params, batch)
        h = jnp.tanh(x @ params["w"] + own(params["b"])[None, None])
        y = total(h @ params["v"]) + x
        rows = mean_of_rows(y) + jnp.sum(jnp.tanh(x[..., :1] * whole[None, None]), axis=(1, 2))
        return rows

    def step(params, batch, direction):
        def own(b):
            return jax.lax.dynamic_slice(b, (jax.lax.axis_index("model") * 3,), (3,))

        def loss(params, batch):
            total = lambda y: jax.lax.psum(y, "model")  # noqa: E731
            return jnp.mean(loss_fn(params, batch, params["b"], own, total))

        return form(loss)(params, batch, direction).dots

    specs = TENSOR | {"emb": P(), "b": P()}
    run = jax.shard_map(step, mesh=MESH, in_specs=(specs, ROWS, specs), out_specs=ROWS)

    def rows(params, batch):
        return loss_fn(params, batch, params["b"], lambda b: b, lambda y: y)

    found = jax.jit(run)(PARAMS, BATCH, DIRECTION)
    testing.assert_dots_close(found, expected_dots(rows, PARAMS, BATCH, DIRECTION))


def between(function, **options):
    """A loss with ``function`` between two uses of parameters; rows are split over "data"."""

    def inside(params, batch):
        h = function(hidden(params, embedded(params, batch)))
        return mean(mean_of_rows(h @ params["v"]))

    return mapped(inside, check_vma=False, **options)


ROUND = [(k, (k + 1) % 4) for k in range(4)]
SENT = {
    "ppermute": lambda h: jax.lax.ppermute(h, "data", ROUND),
    "all_to_all": lambda h: jax.lax.all_to_all(h, "data", 1, 0, tiled=True),
    "all_gather": lambda h: jax.lax.all_gather(h, "data", axis=0, tiled=True),
}


@pytest.mark.parametrize("name", SENT)
def test_rows_that_leave_their_device(name):
    """Their dots come from where they are."""
    found = jax.jit(eager(between(SENT[name])))(PARAMS, BATCH, DIRECTION)
    stayed = jax.jit(eager(between(lambda h: h)))(PARAMS, BATCH, DIRECTION)
    testing.assert_dots_close(found.dots, stayed.dots)
    with pytest.raises(NotImplementedError, match=r"rows are moved inside of(.|\n)*remat=True"):
        late(between(SENT[name]))(PARAMS, BATCH, DIRECTION)


def test_sums_of_the_rows_of_several_devices():
    message = r"\['v'\] meets data in dot_general .*psum at .* combines the rows of several devices"
    for form in (eager, late):
        with pytest.raises(RowAxisError, match=message):
            form(between(lambda h: jax.lax.psum(h, "data")))(PARAMS, BATCH, DIRECTION)

    def scattered(h):
        return jax.lax.psum_scatter(h, "data", scatter_dimension=1, tiled=True)

    found = jax.jit(eager(between(scattered)))(PARAMS, BATCH, DIRECTION)
    assert int(found.conflicts) > 0
    assert bool(jnp.isnan(found.total()).all())


@pytest.mark.slow
def test_statistics_of_all_devices():
    def centred(h):
        return h - jax.lax.pmean(jnp.mean(h, axis=0, keepdims=True), "data")

    with pytest.raises(RowAxisError, match=r"sub at .* combines rows with a value in which rows"):
        eager(between(centred))(PARAMS, BATCH, DIRECTION)


def test_operands_whose_rows_are_split_in_different_ways():
    def inside(params, x, others):
        return mean_of_rows(hidden(params, x) @ params["v"] + jnp.mean(others) * x)

    run = jax.shard_map(
        inside, mesh=MESH, in_specs=(WHOLE, ROWS, P()), out_specs=ROWS, check_vma=False
    )

    def loss_fn(params, batch):
        x = embedded(params, batch)
        return jnp.mean(run(params, x, x))

    with pytest.raises(RowAxisError, match=re.escape("of one operand over the mesh axes ()")):
        eager(loss_fn)(PARAMS, BATCH, DIRECTION)


@jax.custom_vjp
def scaled_by_the_norm(w, x):
    return x @ w


def _scaled_backward(residuals, cotangent):
    w, x = residuals
    gradient = jnp.einsum("bti,bto->io", x, cotangent)
    norm = jax.lax.psum(jnp.sum(jnp.square(gradient)), ("data", "model"))
    return gradient * jax.lax.rsqrt(1 + norm), cotangent @ w.T


scaled_by_the_norm.defvjp(lambda w, x: (x @ w, (w, x)), _scaled_backward)


@pytest.mark.quick("one_row")
@pytest.mark.parametrize("rows", [ROWS, EIGHT], ids=["rows", "one_row"])
def test_a_rule_that_mixes_the_rows_of_devices(rows):
    def inside(params, batch):
        return mean_of_rows(scaled_by_the_norm(params["w"], embedded(params, batch)))

    run = mapped(inside, rows=rows, out=rows, check_vma=False)
    with pytest.raises(RowAxisError, match="must be a sum over rows, or linear in such sums"):
        eager(lambda params, batch: jnp.mean(run(params, batch)))(PARAMS, BATCH, DIRECTION)


@jax.custom_vjp
def copied(x):
    """What tensor parallelism puts before split weights."""
    return x


copied.defvjp(lambda x: (x, None), lambda _, cotangent: (jax.lax.psum(cotangent, "model"),))


@jax.custom_vjp
def added(x):
    """And after them."""
    return jax.lax.psum(x, "model")


added.defvjp(lambda x: (jax.lax.psum(x, "model"), None), lambda _, cotangent: (cotangent,))


@forms
def test_rules_of_tensor_parallelism(form, expected):
    def loss_fn(params, batch):
        x = embedded(params, batch)
        return jnp.mean(mean_of_rows(added(hidden(params, copied(x)) @ params["v"]) + x))

    def step(params, batch, direction):
        dots = form(loss_fn)(params, batch, direction).dots
        return dots | {name: jax.lax.psum(dots[name], "model") for name in ("w", "b", "v")}

    specs = TENSOR | {"emb": P()}
    run = jax.shard_map(
        step, mesh=MESH, in_specs=(specs, ROWS, specs), out_specs=ROWS, check_vma=False
    )
    testing.assert_dots_close(jax.jit(run)(PARAMS, BATCH, DIRECTION), expected)


def test_the_engine_refuses_parameters_inside():
    engine = GradDotProdEngine(mapped(rows_of, out=ROWS), val_batch_size=4)
    with pytest.raises(NotImplementedError, match=r"shard_map .*Take value_grad_and_dots"):
        engine(PARAMS, BATCH)


@pytest.mark.slow
def test_the_engine_takes_data_inside():
    run = jax.shard_map(jnp.tanh, mesh=MESH, in_specs=ROWS, out_specs=ROWS)

    def losses(params, batch):
        return mean_of_rows(run(embedded(params, batch) @ params["w"]) @ params["v"])

    found = GradDotProdEngine(losses, val_batch_size=4)(PARAMS, BATCH).dots
    train, val = (
        {k: leaf[part] for k, leaf in BATCH.items()} for part in (slice(B - 4), slice(B - 4, B))
    )
    direction = jax.grad(lambda params: jnp.mean(losses(params, val)))(PARAMS)
    testing.assert_dots_close(found, expected_dots(losses, PARAMS, train, direction))


def test_explained():
    explanation = explain(tensor(True))(PARAMS, BATCH)
    uses = explanation.uses
    assert "gradients of single rows are not put together" in explanation.norms.refused
    assert explanation.norms.parameters == ()
    assert [use.parameter for use in uses] == ["['b']", "['emb']", "['v']", "['w']"]
    assert {(use.times, use.in_rows) for use in uses} == {(1, True)}


def test_operations_of_all_devices():
    def loss_fn(w, x):
        return jnp.mean(jnp.square(x @ w))

    split = jax.shard_map(
        lambda w, x: jnp.square(x @ w), mesh=MESH, in_specs=(P(), ROWS), out_specs=ROWS
    )
    plain, found = (
        explain(fn)(PARAMS["w"], BATCH["x"][:, 0])
        for fn in (loss_fn, lambda w, x: jnp.mean(split(w, x)))
    )
    # Along "model", devices repeat each other.
    products = 2 * 2 * B * PARAMS["w"].size
    assert plain.plain_flops >= products
    assert found.plain_flops >= 2 * products
    assert not found.uncounted
