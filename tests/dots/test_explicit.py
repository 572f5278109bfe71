"""Meshes whose axes are explicit, which is what ``jax.make_mesh`` gives."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from ghostjax import (
    GradDotProdEngine,
    conservation_error,
    testing,
    value_and_dots_fn,
    value_grad_and_dots,
)
from models.arrays import directions_like, draw
from tests.dots.checks import expected_stacked
from tests.variants import some_quick

B, T, D, F, LAYERS, WORDS = 8, 4, 4, 6, 2, 12
MESH = jax.make_mesh((4, 2), ("data", "model"))
PARAMS = {
    "table": draw(WORDS, D),
    "positions": draw(T, D) / 2,
    "scale": 1 + draw(D) / 4,
    "w": draw(LAYERS, D, F) / 2,
    "b": draw(LAYERS, F) / 3,
    "v": draw(LAYERS, F, D) / 2,
    "head": draw(D, WORDS) / 2,
}
NUMBERS = np.arange(B * T).reshape(B, T)
BATCH = {"ids": jnp.asarray(NUMBERS * 5 % WORDS), "targets": jnp.asarray(NUMBERS * 7 % WORDS)}
DIRECTIONS = directions_like(PARAMS, 2)
ROWS, FEATURES = P("data"), P("data", None, "model")

WHOLE = {name: P() for name in PARAMS}
TENSOR = WHOLE | {
    "w": P(None, None, "model"),
    "b": P(None, "model"),
    "v": P(None, "model"),
    "head": P(None, "model"),
}
FSDP = WHOLE | {
    "table": P(None, "data"),
    "w": P(None, "data"),
    "v": P(None, None, "data"),
    "head": P("data"),
}
FSDP_TENSOR = TENSOR | {"w": P(None, "data", "model"), "v": P(None, "model", "data")}


def normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * scale


def negative_log_likelihoods(logits, targets):
    """[B]"""
    found = jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, WORDS)
    return -jnp.mean(jnp.sum(found, axis=-1), axis=1)


class Nowhere:
    """Ordinary arrays."""

    def product(self, formula, a, b, spec):
        return jnp.einsum(formula, a, b)

    def look_up(self, table, ids):
        return table[ids]


class OnMesh:
    """What explicit meshes ask of programs: where results are."""

    def __init__(self, features, taken=()):
        self.features, self.taken = features, taken

    def product(self, formula, a, b, spec):
        spec = self.features if spec == FEATURES else spec
        return jnp.einsum(formula, a, self.without(b), out_sharding=spec)

    def look_up(self, table, ids):
        return self.without(table).at[ids].get(out_sharding=ROWS)

    def without(self, array):
        """Gathered along the axes of the mesh that weights are stored apart on."""
        spec = jax.typeof(array).sharding.spec
        if ROWS[0] in spec and array.ndim == 2:
            array = reshard(array, P(*(None if name in self.taken else name for name in spec)))
        return array


NOWHERE = Nowhere()


def rows_of(params, batch, mesh=NOWHERE, scanned=False, rematerialized=False):
    """The losses of rows."""

    def layer(x, weights):
        w, b, v = weights
        h = mesh.product("btd,df->btf", normed(x, params["scale"][None, None]), w, FEATURES)
        h = jax.nn.gelu(h + b[None, None])
        scores = mesh.product("btd,bsd->bts", x, x, ROWS)
        x = x + 0.1 * mesh.product("bts,bsd->btd", jax.nn.softmax(scores), x, ROWS)
        return x + mesh.product("btf,fd->btd", h, v, ROWS), None

    if rematerialized:
        layer = jax.checkpoint(layer)
    x = mesh.look_up(params["table"], batch["ids"]) + params["positions"][None]
    weights = params["w"], params["b"], params["v"]
    if scanned:
        x, _ = jax.lax.scan(layer, x, weights)
    else:
        for number in range(LAYERS):
            x, _ = layer(x, [leaf[number] for leaf in weights])
    logits = mesh.product("btd,dw->btw", x, params["head"], FEATURES)
    return negative_log_likelihoods(logits, batch["targets"])


CASES = {
    "data": (WHOLE, OnMesh(ROWS)),
    "tensor": (TENSOR, OnMesh(FEATURES)),
    "fsdp": (FSDP, OnMesh(ROWS, ["data"])),
    "fsdp_tensor": (FSDP_TENSOR, OnMesh(FEATURES, ["data"])),
}
LOOPS = {
    "layers": {},
    "scan": {"scanned": True},
    "remat": {"scanned": True, "rematerialized": True},
}


def placed(tree, specs, *leading):
    return {
        name: jax.device_put(leaf, NamedSharding(MESH, P(*leading, *specs[name])))
        for name, leaf in tree.items()
    }


@pytest.fixture(scope="module")
def expected():
    plain = jax.jit(jax.grad(lambda params, batch: jnp.mean(rows_of(params, batch))))
    return expected_stacked(rows_of, PARAMS, BATCH, DIRECTIONS), plain(PARAMS, BATCH)


@pytest.fixture
def on_mesh():
    with jax.set_mesh(MESH):
        yield


@pytest.mark.quick("fsdp_tensor-scan")
@pytest.mark.usefixtures("on_mesh")
@pytest.mark.parametrize(("case", "loop"), [*itertools.product(CASES, LOOPS)])
def test_dots(case, loop, expected):
    specs, mesh = CASES[case]

    def loss_fn(params, batch):
        return jnp.mean(rows_of(params, batch, mesh, **LOOPS[loop]))

    @jax.jit
    def run(params, batch, directions):
        first = jax.tree.map(lambda leaf: leaf[0], directions)
        result = value_grad_and_dots(loss_fn)(params, batch, direction=first)
        stacked = value_grad_and_dots(loss_fn)(params, batch, direction=directions)
        _, grads, late = value_and_dots_fn(loss_fn)(params, batch)
        found = [(result.dots, stacked.dots), (late(first), late(directions))]
        return found, [result.grads, grads], conservation_error(result, first)

    batch = placed(BATCH, dict.fromkeys(BATCH, ROWS))
    args = placed(PARAMS, specs), batch, placed(DIRECTIONS, specs, None)
    found, grads, errors = run(*args)
    dots, plain = expected
    for one, several in found:
        testing.assert_dots_close(one, jax.tree.map(lambda leaf: leaf[0], dots))
        testing.assert_dots_close(several, dots)
    testing.assert_dots_close(grads, [plain, plain])
    assert max(jax.tree.leaves(errors)) <= 1e-5
    for name, leaf in found[0][0].items():
        assert leaf.sharding.spec == P("data"), name


@pytest.mark.usefixtures("on_mesh")
def test_the_engine_refuses_look_ups():
    specs, mesh = CASES["data"]
    engine = GradDotProdEngine(lambda params, batch: rows_of(params, batch, mesh), val_batch_size=4)
    batch = placed(BATCH, dict.fromkeys(BATCH, ROWS))
    message = r"gather at .*table.* are auto that are explicit around .*Take value_grad_and_dots"
    with pytest.raises(NotImplementedError, match=message):
        engine(placed(PARAMS, specs), batch)


def traffic(compiled):
    totals = collections.Counter()
    for found in testing.collectives(compiled):
        totals[found.kind] += found.bytes
    return totals


# The direction is gathered where the parameters are; a product split over its inputs is summed.
ADDED = {
    "data": set(),
    "tensor": {"all-reduce"},
    "fsdp": {"all-gather"},
    "fsdp_tensor": {"all-gather", "all-reduce"},
}


@pytest.mark.usefixtures("on_mesh")
@pytest.mark.parametrize("case", some_quick(CASES, ["data", "fsdp_tensor"]))
def test_what_dots_add_to_what_is_sent(case):
    specs, mesh = CASES[case]

    def loss_fn(params, batch):
        return jnp.mean(rows_of(params, batch, mesh))

    def plain(params, batch, direction):
        return jax.grad(loss_fn)(params, batch)

    def with_dots(params, batch, direction):
        result = value_grad_and_dots(loss_fn)(params, batch, direction=direction)
        return result.grads, result.dots

    batch = placed(BATCH, dict.fromkeys(BATCH, ROWS))
    args = placed(PARAMS, specs), batch, placed(PARAMS, specs)
    own, base = (jax.jit(step).lower(*args).compile() for step in (with_dots, plain))
    assert set(traffic(own) - traffic(base)) == ADDED[case]
    for found in testing.collectives(own):
        assert all(shape[:1] != (B,) for shape in found.shapes)  # nothing has all rows
