"""What no method can take apart, or is no loss of rows, is refused: by name, with a way out."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine
from models.modules.table import FEATURES, activations, perturbed, squared

ROWS, POSITIONS = 7, 5
WAY_OUT = r"take value_grad_and_dots or value_and_dots_fn with coupled=\"share\""


def call(loss_fn, params, batch, val_batch_size=2):
    return GradDotProdEngine(loss_fn, val_batch_size=val_batch_size)(params, batch)


def call_model(model, batch, params=None, **kwargs):
    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch, **kwargs))

    return call(loss_fn, perturbed(model, batch) if params is None else params, batch)


W = {"w": jnp.asarray(activations(FEATURES, 3)), "v": jnp.asarray(activations(3, 3))}


def dense(params, x):
    return jnp.tanh(x @ params["w"])


# By name: outputs of rows that have been mixed, the operation that is named, and the reason.
MIXED = {
    "reversed": (lambda p, x, i: dense(p, x[::-1]), r"\['w'\] .* dot_general", "rev at HERE"),
    "rolled": (
        lambda p, x, i: jnp.roll(dense(p, x), 1, axis=0) @ p["v"],
        r"\['v'\] .* dot_general",
        "slice takes part of the row axis",
    ),
    "sorted": (
        lambda p, x, i: jnp.sort(dense(p, x), axis=0) @ p["v"],
        r"\['v'\] .* dot_general",
        "sort along the row axis",
    ),
    "minus_the_mean": (
        lambda p, x, i: dense(p, x) - dense(p, x).mean(0, keepdims=True),
        "sub at HERE combines rows with a value in which rows are mixed",
        "reduce_sum at HERE over the row axis",
    ),
    "softmax_in_the_batch": (
        lambda p, x, i: jax.nn.log_softmax(dense(p, x) @ dense(p, -x).T),
        "dot_general at HERE combines rows with other rows",
        "dot_general at HERE meets rows at different places",
    ),
    "softmax_over_rows": (
        lambda p, x, i: jax.nn.softmax(dense(p, x), axis=0),
        "div at HERE combines rows with a value in which rows are mixed",
        "reduce_sum at HERE over the row axis",
    ),
    "attention_over_rows": (
        lambda p, x, i: jax.nn.softmax(x @ x.T) @ dense(p, x) @ p["v"],
        r"\['v'\] .* dot_general",
        "dot_general at HERE sums over the row axis",
    ),
    "permuted_by_data": (
        lambda p, x, i: dense(p, x[i]),
        r"\['w'\] .* dot_general",
        "gather at HERE looks up along the row axis",
    ),
    "a_loop_over_rows": (
        lambda p, x, i: jax.lax.map(lambda row: row @ p["w"], x),
        r"\['w'\] .* dot_general",
        "a loop over the row axis",
    ),
    "a_running_total": (
        lambda p, x, i: jnp.cumsum(dense(p, x), axis=0) @ p["v"],
        r"\['v'\] .* dot_general",
        "cumsum runs along the row axis",
    ),
    "a_branch_that_rows_choose": (
        lambda p, x, i: x @ jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"] * 2),
        r"\['w'\] .* cond",
        "reduce_sum at HERE over the row axis",
    ),
    "a_scalar_that_rows_choose": (
        lambda p, x, i: x * jax.lax.cond(x.sum() > 0, lambda: p["v"][0, 0], lambda: 2.0),
        r"\['v'\] .* cond",
        "reduce_sum at HERE over the row axis",
    ),
    "a_mean_of_inputs": (
        lambda p, x, i: x * (x.mean() + p["v"][0, 0]),
        r"\['v'\] .* add",
        "reduce_sum at HERE over the row axis",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_are_mixed_between_layers(name):
    outputs, operation, reason = MIXED[name]
    batch = {"x": activations(ROWS, FEATURES), "i": np.array([1, 0, 2, 4, 3, 6, 5])}
    here = re.escape(__file__) + r":\d+"
    message = rf"{operation}.*\({reason}.*\).*{WAY_OUT}".replace("HERE", here)
    with pytest.raises(ValueError, match=message):
        call(lambda p, b: squared(outputs(p, jnp.asarray(b["x"]), b["i"])), W, batch)


def first(values):
    return jnp.broadcast_to(values[:1], values.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: losses[::-1], r"rev at .*test_refused.py:\d+ reverses the row axis"),
        (jnp.sort, "sort along the row axis"),
        (lambda losses: jnp.roll(losses, 1), "takes part of the row axis"),
        (first, "takes part of the row axis"),
        (lambda losses: losses[jnp.array([1, 0, 2, 3, 4, 5, 6])], "looks up along the row axis"),
    ],
    ids=["reversed", "sorted", "rolled", "one_for_all", "permuted"],
)
def test_losses_in_another_order(change, message):
    def loss_fn(params, x):
        return change(squared(dense(params, x)))

    message = rf"row i at place i. Found losses that are mixed .*{message}.*in the order of the"
    with pytest.raises(ValueError, match=message):
        call(loss_fn, W, activations(ROWS, FEATURES))


def test_losses_that_depend_on_no_row():
    def of_parameters(params, x):
        return jnp.full(len(x), jnp.sum(params["w"] ** 2))

    with pytest.raises(ValueError, match=r"\['w'\] meets data in the loss,.*depends on no row"):
        call(of_parameters, W, activations(ROWS, FEATURES))
    with pytest.raises(ValueError, match=r"losses that are mixed or .*: they depend on no row"):
        call(lambda params, x: jnp.ones(len(x)), W, activations(ROWS, FEATURES))


def test_a_while_loop():
    def loss_fn(params, x):
        h = jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h * params["v"][0, 0], x)
        return squared(h)

    with pytest.raises(NotImplementedError, match=r"while at .*Use lax.scan"):
        call(loss_fn, W, jnp.asarray(activations(ROWS, FEATURES)))


@pytest.mark.parametrize("by", ["attribute", "argument"])
def test_batchnorm_in_training_mode(by):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if by == "attribute":
                return nn.BatchNorm(use_running_average=False)(x)
            return nn.BatchNorm()(x, use_running_average=False)

    batch = activations(ROWS, FEATURES)
    params = perturbed(Net(), batch)
    stats = {"BatchNorm_0": {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)}}

    def loss_fn(params, batch):
        state = {"params": params, "batch_stats": stats}
        return squared(Net().apply(state, batch, mutable=["batch_stats"])[0])

    message = (
        rf"\['BatchNorm_0'\]\['scale'\] .* mul at .*reduce_sum at .* over the row axis\).*{WAY_OUT}"
    )
    with pytest.raises(ValueError, match=message):
        call(loss_fn, params, batch)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(reduction_axes=(0, -1)),
        nn.LayerNorm(reduction_axes=(0, 1), feature_axes=-1),
        nn.RMSNorm(reduction_axes=0),
    ],
)
def test_a_norm_over_rows(norm):
    model = nn.Sequential([nn.Dense(FEATURES), norm])
    message = r"in ghostjax_(Layer|RMS)Norm_\w+ at .*test_refused.py:\d+ combines rows with a value"
    with pytest.raises(ValueError, match=rf"{message}.*reduce_sum over the row axis.*{WAY_OUT}"):
        call_model(model, activations(ROWS, POSITIONS, FEATURES))


def test_what_to_do_about_batchnorm():
    model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
    batch = activations(ROWS, FEATURES)
    variables = model.init(jax.random.key(0), batch)

    def loss_fn(params, batch):
        state = {**variables, "params": params}
        return squared(model.apply(state, batch, mutable=["batch_stats"])[0])

    message = r"sub at .*Statistics of the batch can be constants, as the running averages of"
    with pytest.raises(ValueError, match=message):
        call(loss_fn, variables["params"], batch)


def test_a_group_norm_that_finds_rows_elsewhere_than_in_front():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.swapaxes(nn.GroupNorm(2)(jnp.swapaxes(x, 0, 1)), 0, 1)

    message = r"in ghostjax_GroupNorm_bias_scale at .*test_refused.py:\d+ combines rows with a"
    with pytest.raises(ValueError, match=rf"{message} value.*{WAY_OUT}"):
        call_model(Net(), activations(ROWS, POSITIONS, FEATURES))


def test_a_convolution_over_the_rows():
    message = r"\['kernel'\] .* conv_general_dilated.*rows on an axis other than the batch"
    with pytest.raises(ValueError, match=rf"{message}.*{WAY_OUT}"):
        call_model(nn.Conv(3, (3,)), activations(ROWS, FEATURES))


DENSE = nn.Dense(1)
DENSE_PARAMS = {"kernel": jnp.ones((FEATURES, 1)), "bias": jnp.ones(1)}


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (lambda y: y.mean(), r"one loss per row, an array of shape \(7,\). Found float32\[\]"),
        (lambda y: y, r"shape \(7,\). Found float32\[7, 1\]"),
        (lambda y: (y[:, 0], 1), r"one loss per row"),
        (lambda y: y[:, 0] > 0, r"floating-point losses. Found bool\[7\]"),
    ],
)
def test_losses_that_are_not_one_number_per_row(reduce, message):
    def loss_fn(params, batch):
        return reduce(DENSE.apply({"params": params}, batch))

    with pytest.raises((ValueError, TypeError), match=message):
        call(loss_fn, DENSE_PARAMS, activations(ROWS, FEATURES))


def losses(params, batch):
    return DENSE.apply({"params": params}, batch)[:, 0]


@pytest.mark.parametrize("val_rows", [0, -3])
def test_val_batch_size_below_one(val_rows):
    with pytest.raises(ValueError, match=f"must be at least 1.*Got {val_rows}"):
        GradDotProdEngine(losses, val_batch_size=val_rows)


@pytest.mark.parametrize("val_rows", [ROWS, ROWS + 1])
def test_val_batch_size_that_leaves_no_training_row(val_rows):
    with pytest.raises(ValueError, match=f"val_batch_size={val_rows} for a batch of 7 rows"):
        call(losses, DENSE_PARAMS, activations(ROWS, FEATURES), val_rows)


def test_val_batch_size_of_another_type():
    with pytest.raises(TypeError, match=r"must be a Python int.*2\.5"):
        GradDotProdEngine(losses, val_batch_size=2.5)


def test_loss_reduction_of_another_name():
    with pytest.raises(ValueError, match='must be "mean" or "sum", got \'none\''):
        GradDotProdEngine(losses, val_batch_size=2, loss_reduction="none")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"x": np.ones((7, 2)), "y": np.ones(6)},
            r"share their leading size(.|\n)*\['y'\]: \(6,\)",
        ),
        ({"x": np.ones((7, 2)), "key": np.float32(1)}, r"\['key'\]: \(\)(.|\n)*further arguments"),
        ({}, "batch has no arrays"),
    ],
)
def test_batches_whose_leaves_disagree(batch, message):
    with pytest.raises(ValueError, match=message):
        call(losses, DENSE_PARAMS, batch)


def test_parameters_that_are_not_real_floats():
    params = {**DENSE_PARAMS, "step": jnp.zeros((), jnp.int32), "phase": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match=r"\['phase'\]: complex64\n(.|\n)*\['step'\]: int32"):
        call(losses, params, activations(ROWS, FEATURES))


def test_a_derivative_of_the_result():
    engine = GradDotProdEngine(losses, val_batch_size=2)
    batch = activations(ROWS, FEATURES)
    for part in (lambda result: result.value, lambda result: result.total()[0]):
        with pytest.raises(NotImplementedError, match="cannot be differentiated"):
            jax.grad(lambda params, part=part: part(engine(params, batch)))(DENSE_PARAMS)
