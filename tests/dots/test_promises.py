"""rowwise and register_row_rule: promises about operations that cannot be looked into."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import tpu as pltpu

from ghostjax import register_row_rule, rowwise, testing, value_grad_and_dots
from ghostjax.core import ROW_RULES
from models.arrays import activations, direction_like, draw
from tests.dots.checks import DENSE, X, check, check_late, expected_dots


@pytest.fixture
def rules(monkeypatch):
    """What a test registers is forgotten."""
    for name in [*ROW_RULES]:
        monkeypatch.delitem(ROW_RULES, name)
    yield ROW_RULES
    ROW_RULES.clear()


def callback(function, x, **options):
    return jax.pure_callback(lambda x: function(np.asarray(x)), jax.typeof(x), x, **options)


@jax.custom_vjp
def sine(x):
    """By NumPy, with a backward rule by NumPy."""
    return callback(np.sin, x, vmap_method="expand_dims")


sine.defvjp(
    lambda x: (sine(x), x), lambda x, ct: (ct * callback(np.cos, x, vmap_method="expand_dims"),)
)


@jax.custom_vjp
def promised_sine(x):
    """With the promises inside."""
    return rowwise(lambda x: callback(np.sin, x))(x)


promised_sine.defvjp(
    lambda x: (promised_sine(x), x),
    lambda x, ct: (ct * rowwise(lambda x: callback(np.cos, x))(x),),
)


def losses_with(middle):
    def losses(params, x):
        h = x @ params["w"]
        h = middle(h.reshape(-1, 4)) + params["b"][None]
        h = h.reshape(*x.shape[:-1], 4)
        return jnp.sum(jnp.square(h), axis=tuple(range(1, h.ndim)))

    return losses


def layers(params, x):
    """A promise in a rematerialised scan, under ``vmap`` of positions."""
    inner = jax.vmap(rowwise(sine), in_axes=1, out_axes=1)

    @jax.checkpoint
    def layer(h, _):
        return inner(h) + h, None

    h = jax.lax.scan(layer, x @ params["w"], None, length=2)[0]
    return jnp.sum(jnp.square(h), (1, 2))


def columns(params, x):
    """Rows on another axis, and an argument without rows."""
    scaled = rowwise(lambda c, x: c * sine(x), axis=(None, 1), out_axis=1)
    return jnp.sum(jnp.square(scaled(jnp.float32(2), (x @ params["w"]).T)), 0)


def trees(params, x):
    shared = rowwise(
        lambda args, c: (sine(args["x"]) * c, args["y"].sum(0)),
        axis=({"x": 0, "y": -1}, None),
        out_axis=(0, 0),
    )
    h = x @ params["w"]
    first, second = shared({"x": h, "y": h.T}, jnp.ones((1, 4)))
    return jnp.sum(first**2, 1) + second


PROMISES = {
    "around": (losses_with(rowwise(sine)), X),
    "merged axes": (losses_with(rowwise(sine)), activations()),
    "inside": (losses_with(promised_sine), X),
    "scan, remat, vmap": (layers, activations()),
    "another axis": (columns, X),
    "trees": (trees, X),
}


@pytest.mark.parametrize("name", PROMISES)
def test_promises(name):
    losses, batch = PROMISES[name]
    check(losses, DENSE, batch)


def test_promises_with_late_directions():
    check_late(*PROMISES["around"][:1], DENSE, X)


def test_parameters_in_a_promise():
    """One meeting; the function is differentiated forwards."""
    inside = rowwise(lambda w, x: jnp.sort(jnp.sin(x @ w), axis=-1), axis=(None, 0))

    def losses(params, x):
        return jnp.sum(jnp.square(inside(params["w"], x) + params["b"][None]), 1)

    check(losses, DENSE, X)


def test_parameters_in_a_promise_per_example():
    """Nothing needs a row axis: the function is looked into."""
    inside = rowwise(lambda w, x: sine(x @ w), axis=(None, 0))

    def one(params, x):
        return jnp.sum(jnp.square(inside(params["w"], x[None])[0] + params["b"]))

    direction = direction_like(DENSE)
    dots = jax.jit(value_grad_and_dots(one, per_example=True))(DENSE, X, direction=direction).dots
    expected = expected_dots(losses_with(jnp.sin), DENSE, X, direction)
    testing.assert_dots_close(dots, expected)


def refused(losses, batch, message, error=ValueError):
    """While it is traced."""
    fn = value_grad_and_dots(lambda p, b: jnp.mean(losses(p, b)))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda p, b: fn(p, b, direction=p), DENSE, batch)


def test_what_a_promise_does_not_cover():
    without_promise = losses_with(sine)
    refused(
        without_promise, X, r"pure_callback .*calls back into Python.*ghostjax.rowwise .*promises"
    )
    refused(
        losses_with(lambda h: rowwise(lambda x: x + 0, axis=1)(h)),
        X,
        r"ghostjax_rowwise_<lambda> at .* has rows of input 0 at Rows\(axis=0.*rowwise says 1",
    )
    refused(
        lambda p, x: rowwise(lambda y: (x @ p["w"]) + y)(x[:, :4]).sum(1),
        X,
        "what the function closes over has to be an argument",
    )
    refused(
        lambda p, x: rowwise(sine, out_axis=None)(x @ p["w"]).sum(1) + (x @ p["w"]).sum(1),
        X,
        "result that rowwise says has no rows",
    )
    refused(
        lambda p, x: rowwise(lambda w, x: sine(x @ w), axis=(None, 0))(p["w"], x).sum(1),
        X,
        r"promised to keep rows in place and uses parameters \(\['w'\]\) beside a custom_vjp",
        NotImplementedError,
    )


def test_axes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"axis\[0\] is 2, but the array has shape \(6, 5\)"):
        rowwise(jnp.sin, axis=2)(X)
    with pytest.raises(ValueError, match=r"one size. Found axis\[0\] = 0 .* and axis\[1\] = 0 "):
        rowwise(jnp.add)(X, X[:1])
    with pytest.raises(ValueError, match=r"one size. Found axis\[0\] = 0 .* and out_axis = 0 "):
        rowwise(lambda x: x[1:])(X)
    with pytest.raises(ValueError, match=r"axis = \(0, 0\) must be an integer, None, or a tree"):
        rowwise(jnp.sin, axis=(0, 0))(X)


def test_a_promise_changes_nothing_else():
    promised = rowwise(lambda x: jnp.tanh(x) * 2)
    plain, under = (
        jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(f(x) ** 2)))(X)
        for f in (lambda x: jnp.tanh(x) * 2, promised)
    )
    chex.assert_trees_all_equal(plain, under)
    keys = jax.random.split(jax.random.key(0), 6)
    drawn = rowwise(jax.vmap(lambda key: jax.random.normal(key, (3,))))(keys)
    assert drawn.shape == (6, 3)


def test_registered_rules(rules):
    def in_front(axes, shapes, params):
        assert shapes == ((6, 4),)
        assert params["vmap_method"] == "expand_dims"
        return 0 if axes == (0,) else None

    register_row_rule("pure_callback", in_front)
    register_row_rule("pure_callback", in_front)
    check(losses_with(sine), DENSE, X)


def test_a_rule_for_foreign_functions(rules):
    """Traced: nothing is registered under that name."""

    @jax.custom_vjp
    def foreign(x):
        return jax.ffi.ffi_call("my_sine", jax.typeof(x))(x)

    foreign.defvjp(lambda x: (foreign(x), x), lambda x, ct: (ct * foreign(x),))
    losses = losses_with(foreign)
    refused(losses, X, "ffi_call at .*is not known to keep rows in place .*register_row_rule")

    def rule(axes, shapes, params):
        return 0 if params["target_name"] == "my_sine" else NotImplemented

    register_row_rule("ffi_call", rule)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))
    shapes = jax.eval_shape(lambda p, x: fn(p, x, direction=p), DENSE, X)
    assert shapes.dots["w"].shape == (6,)


def test_custom_partitioning_is_looked_into():
    @custom_partitioning
    def tanh(x):
        return jnp.tanh(x)

    tanh.def_partition(
        partition=None,
        infer_sharding_from_operands=None,
        sharding_rule="b f -> b f",
    )

    @jax.custom_vjp
    def activation(x):
        return tanh(x)

    activation.defvjp(lambda x: (tanh(x), x), lambda x, ct: (ct * (1 - tanh(x) ** 2),))
    fn = value_grad_and_dots(lambda p, x: jnp.mean(losses_with(activation)(p, x)))
    shapes = jax.eval_shape(lambda p, x: fn(p, x, direction=p), DENSE, X)
    assert shapes.dots["w"].shape == (6,)


def scaled_by_lengths(x, lengths):
    """All lengths are in front of every program, which takes its own."""

    def kernel(lengths_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...] * lengths_ref[pl.program_id(0)]

    row = pl.BlockSpec((1, x.shape[1]), lambda i, _: (i, 0))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(len(x),), in_specs=[row], out_specs=row
    )
    call = pl.pallas_call(kernel, grid_spec=spec, out_shape=jax.typeof(x), interpret=True)
    return call(lengths, x)


@pytest.mark.slow
@pytest.mark.parametrize("promised", [False, True])
def test_a_promise_about_a_kernel(promised):
    """Of a kernel that reads scalars of other rows, through which no gradient flows."""
    call = rowwise(scaled_by_lengths) if promised else scaled_by_lengths

    @jax.custom_vjp
    def scaled(x, lengths):
        return call(x, lengths)

    scaled.defvjp(lambda *args: (call(*args), args), lambda kept, ct: (call(ct, kept[1]), None))

    def losses(params, batch):
        x, lengths = batch
        h = scaled(x @ params["w"], lengths) + params["b"][None]
        return jnp.sum(jnp.square(h), 1)

    batch = X, jnp.arange(6, dtype=jnp.float32)
    testing.assert_rowwise(scaled_by_lengths, batch, derivatives=False)
    check(losses, DENSE, batch)


def test_rules_that_do_not_fit(rules):
    losses = losses_with(sine)
    rules["pure_callback"] = lambda axes, shapes, params: NotImplemented
    refused(losses, X, "calls back into Python")
    rules["pure_callback"] = lambda axes, shapes, params: [None]
    refused(losses, X, "row rule that finds no rows in this output")
    rules["pure_callback"] = lambda axes, shapes, params: 2
    refused(losses, X, r"must give an axis or None for each of its 1 outputs of ranks \[2\]")
    rules["pure_callback"] = lambda axes, shapes, params: [0, 0]
    refused(losses, X, r"Found \[0, 0\]")
    rules["pure_callback"] = lambda axes, shapes, params: 1
    refused(losses, X, "row rule that finds no rows in this output")


def test_what_cannot_be_registered(rules):
    def rule(axes, shapes, params):
        return 0

    with pytest.raises(ValueError, match="rows go in the primitive sin is known"):
        register_row_rule(jax.lax.sin_p, rule)
    with pytest.raises(ValueError, match="rows go in the primitive scan is known"):
        register_row_rule("scan", rule)
    register_row_rule("mine", rule)
    with pytest.raises(ValueError, match="The primitive mine has a row rule already"):
        register_row_rule("mine", lambda axes, shapes, params: None)


def test_what_only_shows_values_passes(capfd):
    """Prints and callbacks without results may see rows, statistics and parameters together."""

    def losses(params, x):
        h = jnp.tanh(x @ params["w"])
        jax.debug.print("rows {h} {m}", h=h, m=h.mean(0))
        jax.debug.print("both {m}, {w}", m=h.mean(), w=params["b"].sum())
        jax.debug.print("parameters {w}", w=params["w"])
        jax.debug.callback(lambda *_: None, h, h.mean(), params["w"])
        seen = jax.lax.stop_gradient((h, h.mean(), params["w"]))
        io_callback(lambda *_: None, None, *seen)
        return jnp.sum(h + params["b"][None], 1)

    fn = value_grad_and_dots(lambda p, b: jnp.mean(losses(p, b)))
    direction = direction_like(DENSE)
    dots = jax.jit(lambda p, b: fn(p, b, direction=direction).dots)(DENSE, X)
    jax.block_until_ready(dots)
    jax.effects_barrier()
    shown = capfd.readouterr().out
    assert [shown.count(word) for word in ("rows", "both", "parameters")] == [1, 1, 1]
    testing.assert_dots_close(dots, expected_dots(losses, DENSE, X, direction))


def test_results_of_io_callbacks_are_not_followed():
    def losses(params, x):
        h = jax.lax.stop_gradient(x @ params["w"])
        return jnp.sum(io_callback(np.asarray, jax.typeof(h), h) + params["b"][None], 1)

    refused(losses, X, "io_callback .*calls back into Python")


def test_promises_that_are_broken():
    x, y = draw(4, 3), draw(3, 4, seed=1)
    testing.assert_rowwise(lambda x, y: (jnp.tanh(x), y * 2), [x, y], (0, 1), (0, 1))
    testing.assert_rowwise(lambda x: jax.random.permutation(jax.random.key(0), x, 1), [x])
    testing.assert_rowwise(lambda x: callback(np.sin, x), [x], derivatives=False)
    testing.assert_rowwise(lambda x, c: x @ c, [x, draw(3, 2)], (0, None))
    with pytest.raises(AssertionError, match=r"result changes in row \d by .* only row \d"):
        testing.assert_rowwise(lambda x: jnp.roll(x, 1, axis=0), [x])
    with pytest.raises(AssertionError, match=r"cotangent\[0\] changes in row \d"):
        testing.assert_rowwise(mixing_backwards, [x])
    with pytest.raises(ValueError, match=r"two or more rows are needed, of one size\. Found \{1\}"):
        testing.assert_rowwise(jnp.sin, [x[:1]])


@jax.custom_vjp
def mixing_backwards(x):
    return x


mixing_backwards.defvjp(lambda x: (x, None), lambda _, ct: (ct + ct.mean(0, keepdims=True),))
