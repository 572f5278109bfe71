"""Dots on meshes of devices: how they are sharded, and what devices tell each other."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from ghostjax.core import routes
from models.arrays import directions_like, draw, mean_squares
from tests.dots.checks import expected_stacked
from tests.variants import crossed

PARAMS = {"first": draw(8, 16) / 3, "second": draw(16, 8) / 3}
DIRECTIONS = directions_like(PARAMS)
X = draw(16, 4, 8, seed=1)
SPECS = {
    "whole": (PartitionSpec(), PartitionSpec()),
    "tensor": (PartitionSpec(None, "model"), PartitionSpec("model", None)),
    "tensor_inputs": (PartitionSpec("model", None), PartitionSpec(None, "model")),
    "fsdp": (PartitionSpec("data", "model"), PartitionSpec("model", "data")),
}
ROWS = PartitionSpec("data")


def losses(params, x):
    return mean_squares(jnp.tanh(x @ params["first"]) @ params["second"] + x)


def loss_fn(params, x):
    return jnp.mean(losses(params, x))


def eager(params, x, directions):
    result = value_grad_and_dots(loss_fn)(params, x, direction=directions)
    return result.dots, result.grads


def late(params, x, directions):
    _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
    return dots(directions), grads


FORMS = {"eager": eager, "late": late}


def jitted(form):
    """With a cache of its own: the route is chosen while a function is traced."""
    return jax.jit(lambda *args: FORMS[form](*args))


@pytest.fixture(scope="module")
def expected():
    return expected_stacked(losses, PARAMS, X, DIRECTIONS), jax.jit(jax.grad(loss_fn))(PARAMS, X)


def take_rows(monkeypatch):
    taken = []

    def always(sizes, directions, *, gradient):
        taken.append(sizes)
        return True

    monkeypatch.setattr(routes, "rows_cost_less", always)
    return taken


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def placed(mesh, specs, rows):
    specs = dict(zip(PARAMS, specs))

    def place(tree, *leading):
        return {
            name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*leading, *specs[name])))
            for name, leaf in tree.items()
        }

    return place(PARAMS), jax.device_put(X, NamedSharding(mesh, rows)), place(DIRECTIONS, None)


def compare(found, expected):
    dots, grads = found
    testing.assert_dots_close(dots, expected[0])
    testing.assert_dots_close(grads, expected[1], rtol=1e-6)


@pytest.mark.parametrize(("specs", "form"), crossed(SPECS, FORMS))
def test_row_by_row(specs, form, expected, monkeypatch):
    taken, mesh = take_rows(monkeypatch), mesh_of(AxisType.Auto)
    found = jitted(form)(*placed(mesh, SPECS[specs], ROWS))
    assert len(taken) == 2
    compare(found, expected)
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    for leaf in jax.tree.leaves(found[0]):
        assert leaf.sharding.is_equivalent_to(split, leaf.ndim)


def in_shard_map(mesh):
    """``eager``, by every device for its own rows."""

    def local(params, x, directions):
        dots, grads = eager(params, x, directions)
        return dots, jax.lax.pmean(grads, "data")

    whole, out_specs = PartitionSpec(), (PartitionSpec(None, "data"), PartitionSpec())
    options = {"mesh": mesh, "in_specs": (whole, ROWS, whole), "out_specs": out_specs}
    return jax.jit(jax.shard_map(local, check_vma=False, **options))


@pytest.mark.parametrize("way", ["automatic", "explicit", "shard_map"])
def test_export_for_several_devices(way, expected, monkeypatch):
    """The page of what is refused says what JAX says, and the ways out."""
    take_rows(monkeypatch)
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    args = placed(mesh, SPECS["whole"], ROWS)
    function = in_shard_map(mesh) if way == "shard_map" else jitted("eager")
    if way == "automatic":
        with pytest.raises(NotImplementedError, match="serialization of host_callbacks is not yet"):
            jax.export.export(function)(*args)
        return
    exported = jax.export.export(function)(*args)
    assert exported.nr_devices == mesh.size
    compare(exported.call(*args), expected)


@pytest.mark.parametrize(
    "rows",
    [
        PartitionSpec("data", None, "model"),
        PartitionSpec("data", "model"),
        PartitionSpec(None, "data", "model"),
        PartitionSpec(("data", "model")),
    ],
    ids=["features", "positions", "no_rows", "both_axes"],
)
def test_batches_that_are_sharded_along_other_axes(rows, expected, monkeypatch):
    """Where both operands' features lie along one axis of the mesh, one of them moves."""
    take_rows(monkeypatch)
    args = placed(mesh_of(AxisType.Auto), SPECS["tensor"], rows)
    compare(jitted("eager")(*args), expected)


@pytest.mark.parametrize(
    ("rows", "axes", "reduces"),
    [
        (PartitionSpec("data", None, "model"), (None, None, None), 2),
        (PartitionSpec("data"), (None, None, "model"), 2),
        (PartitionSpec("data"), (None, None, None), 1),
        (PartitionSpec("data", "model"), (None, "model", None), 2),
    ],
    ids=["inputs", "outputs", "rows", "positions"],
)
def test_what_the_loop_itself_tells_other_devices(rows, axes, reduces):
    """The sum over rows, and the dots' over features: two reductions, and nothing is gathered."""
    mesh, outputs = mesh_of(AxisType.Auto), PartitionSpec("data", *axes[1:])
    a = jax.device_put(X, NamedSharding(mesh, rows))
    c = jax.device_put(draw(16, 4, 6, seed=2), NamedSharding(mesh, outputs))
    spec = PartitionSpec(None, *(rows[2:3] or (None,)), axes[2])
    directions = jax.device_put(draw(3, 8, 6, seed=3), NamedSharding(mesh, spec))
    loop = jax.jit(routes.row_loop, static_argnums=0)
    compiled = loop.lower(None, a, c, directions).compile()
    assert [found.kind for found in testing.collectives(compiled)] == ["all-reduce"] * reduces
    total, dots = compiled(a, c, directions)
    whole = loop(None, X, draw(16, 4, 6, seed=2), draw(3, 8, 6, seed=3))
    testing.assert_dots_close((total, dots), whole, rtol=1e-6)
    assert dots.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "data")), 2)


@pytest.mark.parametrize("form", FORMS)
def test_explicit_axes_take_tangents(form, expected, monkeypatch):
    taken, mesh = take_rows(monkeypatch), mesh_of(AxisType.Explicit)
    found = jitted(form)(*placed(mesh, SPECS["whole"], ROWS))
    compare(found, expected)
    assert not taken
    for leaf in jax.tree.leaves(found[0]):
        assert leaf.sharding.spec == PartitionSpec(None, "data")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_shard_map(check_vma, form, expected, monkeypatch):
    """Every device has rows of its own. JAX sums the gradient itself where it checks axes."""
    taken, mesh = take_rows(monkeypatch), mesh_of(AxisType.Auto)

    def step(params, x, directions):
        dots, grads = FORMS[form](params, x, directions)
        if not check_vma:
            grads = jax.lax.psum(grads, "data")
        return dots, jax.tree.map(lambda leaf: leaf / 4, grads)

    whole, rows, split = PartitionSpec(), ROWS, PartitionSpec(None, "data")
    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, rows, whole),
        out_specs=(split, whole),
        check_vma=check_vma,
    )
    compare(jax.jit(run)(PARAMS, X, DIRECTIONS), expected)
    assert not taken
