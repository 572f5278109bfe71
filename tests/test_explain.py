"""explain: what it says beside what is run."""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import explain, value_grad_and_dots
from ghostjax._late import value_and_dots_fn
from models.arrays import FEATURES, POSITIONS, ROWS, activations, draw
from models.flax import MODELS
from models.layers import LAYERS
from models.modules import CASES
from tests.dots.checks import DENSE, X, dense
from tests.dots.test_sharded import mesh_of


def mean_of(row_losses):
    return lambda params, batch: jnp.mean(row_losses(params, batch))


def explained(name, table=MODELS, **kwargs):
    row_losses, params, batch = table[name]()
    return explain(mean_of(row_losses), **kwargs)(params, batch)


def table_of(explanation, *fields):
    return [tuple(getattr(use, field) for field in fields) for use in explanation.uses]


def test_dense():
    def loss_fn(params, x):
        return jnp.mean(jnp.square(dense(params, x)))

    explanation = explain(loss_fn)(DENSE, X)
    outputs = ROWS * 4
    paired = 2 * outputs + ROWS  # products with cotangents, and their sums
    assert table_of(explanation, "parameter", "flops", "late_flops", "late_bytes") == [
        ("['b']", paired, paired, 4 * outputs),
        (
            "['w']",
            2 * ROWS * FEATURES * 4 + paired,
            2 * ROWS * FEATURES * 4 + paired,
            4 * (outputs + ROWS * FEATURES),
        ),
    ]
    assert (
        table_of(explanation, "times", "row_axis", "in_rows", "route", "late_route")
        == [(1, "0", True, "tangent", "tangent")] * 2
    )
    assert {use.operation.split(" at ")[0] for use in explanation.uses} == {"add", "dot_general"}
    assert all("checks.py:" in use.operation for use in explanation.uses)
    assert explanation.unused == explanation.uncounted == ()
    assert (explanation.num_rows, explanation.directions, explanation.push_flops) == (ROWS, None, 0)
    assert explanation.flops == explanation.plain_flops + sum(u.flops for u in explanation.uses)
    assert explanation.cost == explanation.flops / explanation.plain_flops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_scan", "gpt2_scan_remat"])
def test_a_loop_of_layers_is_multiplied_out(name, standard_promotion):
    scanned, unrolled = explained(name), explained("gpt2")
    for use in scanned.uses:
        assert use.times == (2 if "Block" in use.parameter else 1)
    for field in ("flops", "late_flops", "late_bytes"):
        # A loop cuts what every layer has of the parameters out of a stack.
        total = sum(getattr(use, field) for use in unrolled.uses)
        assert sum(getattr(use, field) for use in scanned.uses) == pytest.approx(total, rel=0.01)
    forward = unrolled.plain_flops / 3
    recomputed = forward if "remat" in name else 0
    assert scanned.plain_flops - unrolled.plain_flops == pytest.approx(recomputed, abs=forward / 4)


@pytest.mark.slow
def test_loops_in_loops(standard_promotion):
    rounds = POSITIONS, 2 * POSITIONS  # of a recurrent cell, in layers of two
    case = CASES["scan_with_shared_weights_inside_scan_over_layers"]
    row_losses, params, batch = case(ROWS, POSITIONS, jnp.float32)
    explanation = explain(mean_of(row_losses))(params, batch)
    assert {use.times for use in explanation.uses} <= {2, *rounds}
    assert max(use.times for use in explanation.uses) == 2 * POSITIONS


@pytest.mark.slow
def test_a_tied_table_is_used_twice(standard_promotion):
    uses = [use for use in explained("gpt2").uses if "embedding" in use.parameter]
    assert [use.operation.split()[0] for use in uses] == ["gather", "dot_general"]


@pytest.mark.slow
def test_convolutions(standard_promotion):
    explanation = explained("cnn")
    products = [u for u in explanation.uses if "conv_general_dilated" in u.operation]
    assert [use.parameter for use in products] == ["['Conv_0']['kernel']", "['Conv_1']['kernel']"]
    # 3x3 at strides of 2 on 6x6: both kernels reach over the edge of the images.
    paired = 2 * ROWS * 9 * 8 + ROWS
    assert products[0].flops == 2 * ROWS * 8**2 * 3 * 8 + paired
    assert products[1].flops == 2 * ROWS * 7**2 * 2 * 8 + paired


def test_weight_decay_belongs_to_no_row():
    def loss_fn(params, x):
        decay = sum(jnp.sum(jnp.square(leaf)) for leaf in params.values())
        return jnp.mean(jnp.square(dense(params, x))) + 1e-3 * decay

    explanation = explain(loss_fn)(DENSE, X)
    assert table_of(explanation, "parameter", "row_axis", "in_rows") == [
        ("['b']", "0", True),
        ("['b']", "-", False),
        ("['w']", "0", True),
        ("['w']", "-", False),
    ]
    assert explanation.push_flops > 0
    assert "shared" in str(explanation)


def test_a_loss_of_parameters_alone():
    [use] = explain(lambda w, x: jnp.sum(w**2))(X[0], X).uses
    assert (use.operation, use.in_rows, use.late_bytes) == ("the loss", False, 4)


def test_unused_parameters():
    def loss_fn(params, x):
        jnp.cumsum(x @ params["dead"], axis=0)  # goes nowhere
        stopped = jax.lax.stop_gradient(params["stopped"])
        x = jnp.where(x > params["threshold"], x + stopped, 0.0)
        return jnp.mean(jnp.square(x @ params["w"]))

    params = {
        "dead": draw(FEATURES, 2),
        "nowhere": draw(3),
        "stopped": jnp.float32(1),
        "threshold": jnp.float32(0),
        "w": draw(FEATURES, 4),
    }
    explanation = explain(loss_fn)(params, X)
    assert explanation.unused == ("['dead']", "['nowhere']", "['stopped']", "['threshold']")
    assert [use.parameter for use in explanation.uses] == ["['w']"]
    assert "unused: ['dead'], ['nowhere'], ['stopped'], ['threshold']" in str(explanation)
    dots = value_grad_and_dots(loss_fn)(params, X, direction=params).dots
    late = value_and_dots_fn(loss_fn)(params, X)[2](params)
    for name in params:
        np.testing.assert_allclose(late[name], dots[name], rtol=1e-6)
        assert np.any(dots[name]) == (name == "w")


def test_several_parameters_at_once():
    def loss_fn(params, x):
        return jnp.mean(jnp.square(x @ (params["w"] + params["a"] @ params["b"])))

    params = {"a": draw(FEATURES, 2), "b": draw(2, 4), "w": draw(FEATURES, 4)}
    explanation = explain(loss_fn)(params, X)
    each = 2 * ROWS * FEATURES * 4 + 2 * ROWS * 4 + ROWS
    assert table_of(explanation, "parameter", "flops") == [(f"['{n}']", each) for n in "abw"]
    assert explanation.late_bytes == 4 * (ROWS * FEATURES + ROWS * 4)
    # dA @ B and A @ dB; their sums with zeros are none of the push.
    products = 2 * 2 * FEATURES * 2 * 4
    assert products <= explanation.push_flops <= products + 3 * FEATURES * 4


def test_a_look_up_with_out_sharding():
    """Its body has automatic axes, where those around it are explicit."""
    mesh, rows = mesh_of(AxisType.Explicit), PartitionSpec("data")

    def loss_fn(table, ids, **options):
        return jnp.mean(jnp.square(table.at[ids].get(**options)))

    table, ids = draw(6, 4), jnp.zeros((8, 3), jnp.int32)
    alone = explain(loss_fn)(table, ids)
    with jax.set_mesh(mesh):
        ids = jax.device_put(ids, NamedSharding(mesh, rows))
        found = explain(functools.partial(loss_fn, out_sharding=rows))(table, ids)
    fields = "row_axis", "route", "late_route", "flops", "late_flops"
    assert table_of(found, *fields) == table_of(alone, *fields)
    assert [norm.route for norm in found.norms.parameters] == ["together"]


@pytest.mark.slow
def test_rules_of_custom_vjp_functions():
    explanation = explained("custom_vjp_norm", LAYERS)
    by_rule = [use for use in explanation.uses if use.route == "rule"]
    assert {use.parameter for use in by_rule} == {"['bias']", "['scale']"}
    assert {use.operation.split()[0] for use in by_rule} == {"custom_vjp_call"}
    assert sorted(use.times for use in by_rule) == [1, 1, 2, 2]
    assert all(use.flops == use.late_flops > 0 for use in by_rule)


def test_rows_merged_with_positions():
    def loss_fn(w, x):
        first = x.reshape(-1, FEATURES) @ w
        last = jnp.swapaxes(x, 0, 1).reshape(-1, FEATURES) @ w
        return jnp.mean(first) + jnp.mean(last)

    explanation = explain(loss_fn)(draw(FEATURES, 4), activations())
    assert table_of(explanation, "row_axis") == [("0 = B x 6",), ("0 = 6 x B",)]


def test_per_example():
    def loss_fn(params, row):
        return jnp.mean(jnp.square(dense(params, row[None])))

    def of_batch(params, x):
        return jnp.mean(jnp.square(dense(params, x)))

    one, all_rows = (
        explain(loss, per_example=per_example)(DENSE, X)
        for loss, per_example in ((loss_fn, True), (of_batch, False))
    )
    assert {use.row_axis for use in one.uses} == {"vmap"}
    fields = ("parameter", "times", "flops", "late_flops", "late_bytes")
    assert table_of(one, *fields) == table_of(all_rows, *fields)
    assert one.num_rows == ROWS
    assert one.plain_flops == pytest.approx(all_rows.plain_flops, rel=0.15)


@pytest.mark.quick("cnn-True")
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", ["gpt2_scan_remat", "cnn", "gru_of_padded_sequences"])
def test_bytes_are_those_that_are_kept(name, per_example, standard_promotion):
    row_losses, params, batch = MODELS[name]()

    def one(params, row):
        return row_losses(params, jax.tree.map(lambda leaf: leaf[None], row))[0]

    loss_fn = one if per_example else mean_of(row_losses)

    def factors(params, batch):
        return value_and_dots_fn(loss_fn, per_example=per_example)(params, batch)[2].factors

    leaves = jax.tree.leaves(jax.eval_shape(factors, params, batch))
    explanation = explain(loss_fn, per_example=per_example)(params, batch)
    assert explanation.late_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.slow
def test_shapes_in_the_place_of_arrays(standard_promotion):
    row_losses, params, batch = MODELS["gpt2_scan_remat"]()
    fn = explain(mean_of(row_losses), directions=2)
    shapes = jax.eval_shape(lambda *args: args, params, batch)
    assert fn(*shapes) == fn(params, batch) == fn(params, shapes[1])


def test_nothing_is_allocated():
    """The parameters would take 4 TiB."""

    def loss_fn(layers, x, scale):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) * scale, None), x, layers)
        return jnp.mean(x)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1 << 10, 1 << 15, 1 << 15), (64, 1 << 15), ())
    ]
    explanation = explain(loss_fn)(*shapes)
    [use] = explanation.uses
    product = 2 * 64 * 2**30
    assert use.times == 1 << 10
    assert use.flops == pytest.approx(use.times * product, rel=1e-3)
    assert explanation.plain_flops == pytest.approx(3 * use.times * product, rel=1e-3)


def test_other_arguments():
    def loss_fn(x, kind, params, more, *, scale):
        assert kind == "tanh"
        losses = jnp.square(getattr(jnp, kind)(x @ params + more) * scale)
        return jnp.mean(losses), losses

    fn = explain(loss_fn, argnums=(2, 3), batch_argnums=0, has_aux=True)
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    explanation = fn(X, "tanh", draw(FEATURES), draw(1), scale=shape)
    assert [use.parameter for use in explanation.uses] == ["[0]", "[1]"]
    assert inspect.unwrap(fn) is loss_fn


def test_a_while_loop_is_named():
    explanation = explained("weights_from_a_root", LAYERS)
    [place] = explanation.uncounted
    assert place.startswith("while at ")
    assert f"counted once, however often they run: while at {pathlib.Path(place).name}" in str(
        explanation
    )


@pytest.mark.parametrize("directions", [0, -1])
def test_directions_are_at_least_one(directions):
    with pytest.raises(ValueError, match=f"at least 1, or None.*{directions}"):
        explain(dense, directions=directions)


def test_what_the_loss_does_wrong_is_an_error():
    with pytest.raises(ValueError, match='loss_reduction must be "mean" or "sum"'):
        explain(dense, loss_reduction="max")
    with pytest.raises(ValueError, match="loss_fn must return a scalar loss"):
        explain(dense)(DENSE, X)
