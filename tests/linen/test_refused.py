"""What cannot be taken apart exactly is refused, by name and with a way out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine, testing, value_grad_and_dots
from tests.linen.cases import FEATURES, activations, ids, perturbed, squared

ROWS, POSITIONS = 7, 5


def call(loss_fn, params, batch, val_batch_size=2):
    return GradDotProdEngine(loss_fn, val_batch_size=val_batch_size)(params, batch)


def call_model(model, batch, params=None, **kwargs):
    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch, **kwargs))

    return call(loss_fn, perturbed(model, batch) if params is None else params, batch)


OUTER = nn.Dense(3)
MADE_FOR_ROWS = jnp.linspace(0.5, 2, ROWS)[:, None, None]


def merged_axes(params, x):
    flat = OUTER.apply({"params": params}, x.reshape(-1, FEATURES))
    return flat.reshape(*x.shape[:2], 3)


@pytest.mark.parametrize(
    "outputs",
    [
        merged_axes,
        lambda params, x: OUTER.apply({"params": params}, x) @ params["kernel"].T,
        lambda params, x: OUTER.apply({"params": jax.tree.map(jnp.sin, params)}, x),
        lambda params, x: OUTER.apply({"params": params}, x) * MADE_FOR_ROWS,
    ],
    ids=["merged_axes", "read_from_the_tree", "changed", "constant_with_rows"],
)
def test_value_grad_and_dots_takes_what_the_engine_does_not(outputs):
    def losses(params, batch):
        return squared(outputs(params, batch))

    batch = activations(ROWS, POSITIONS, FEATURES)
    params = perturbed(OUTER, batch)
    with pytest.raises(ValueError, match=r"ghostjax\.value_grad_and_dots, which takes any JAX"):
        call(losses, params, batch)
    fn = value_grad_and_dots(lambda params, batch: jnp.mean(losses(params, batch)))
    dots = jax.jit(fn)(params, batch, direction=params).dots
    rows = testing.per_example_grads(losses, params, batch)
    expected = jax.tree.map(lambda g, v: np.tensordot(g, v, axes=v.ndim), rows, params)
    testing.assert_dots_close(dots, expected)


@pytest.mark.parametrize("positions", [POSITIONS, ROWS], ids=["T", "T_equals_N"])
def test_positions_without_a_row_axis(positions):
    """With T = N the table's output looks as if it had rows."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, FEATURES, name="tokens")(tokens)
            x = x + nn.Embed(16, FEATURES, name="positions")(jnp.arange(tokens.shape[1]))[None]
            return nn.Dense(3)(x)

    message = (
        r"\['positions'\]\['embedding'\]: used in Net.__call__ \(the outermost module\) itself, "
        r"which also calls layers(.|\n)*give positions a row axis"
    )
    with pytest.raises(ValueError, match=message):
        call_model(Net(), ids(ROWS, positions))


def test_a_bare_parameter_beside_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            token = self.param("class_token", nn.initializers.normal(), (1, 1, FEATURES))
            token = jnp.broadcast_to(token, (x.shape[0], 1, FEATURES))
            return nn.Dense(3)(jnp.concatenate([token, x], axis=1))

    with pytest.raises(ValueError, match=r"\['class_token'\].*Net.__call__(.|\n)*bare parameter"):
        call_model(Net(), activations(ROWS, POSITIONS, FEATURES))


def test_a_tied_table_read_from_its_module():
    class Net(nn.Module):
        def setup(self):
            self.embed = nn.Embed(11, FEATURES)

        def __call__(self, tokens):
            return self.embed(tokens) @ self.embed.embedding.T

    with pytest.raises(ValueError, match=r"\['embed'\]\['embedding'\](.|\n)*Embed.attend"):
        call_model(Net(), ids(ROWS, POSITIONS))


def test_a_parameter_read_from_the_tree():
    model = nn.Embed(11, FEATURES)
    batch = ids(ROWS, POSITIONS)

    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch) @ params["embedding"].T)

    with pytest.raises(ValueError, match=r"\['embedding'\] is used outside the module"):
        call(loss_fn, perturbed(model, batch), batch)


def test_weight_decay_inside_the_loss():
    model = nn.Dense(3)
    batch = activations(ROWS, FEATURES)

    def loss_fn(params, batch):
        decay = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        return squared(model.apply({"params": params}, batch)) + decay

    with pytest.raises(ValueError, match=r"used outside every module call \(.*test_refused.py:\d+"):
        call(loss_fn, perturbed(model, batch), batch)


def test_every_uncovered_parameter_is_listed():
    model = nn.Dense(3)
    batch = activations(ROWS, FEATURES)

    def loss_fn(params, batch):
        cast = jax.tree.map(lambda leaf: leaf * 2, params)
        return squared(model.apply({"params": cast}, batch))

    with pytest.raises(ValueError, match=r"\['bias'\]: used outside(.|\n)*\['kernel'\]: used out"):
        call(loss_fn, perturbed(model, batch), batch)


def test_rows_merged_with_positions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            flat = nn.Dense(3)(x.reshape(-1, FEATURES))
            return flat.reshape(*x.shape[:2], 3)

    with pytest.raises(ValueError, match=r"\[35, 3\](.|\n)*apply layers to \[N, T, F\]"):
        call_model(Net(), activations(ROWS, POSITIONS, FEATURES))


def test_a_vmap_over_rows():
    model = nn.Dense(3)
    batch = activations(ROWS, FEATURES)

    def loss_fn(params, batch):
        return squared(jax.vmap(lambda row: model.apply({"params": params}, row))(batch))

    with pytest.raises(ValueError, match="not every array has a row axis of its own"):
        call(loss_fn, perturbed(model, batch), batch)


def test_weights_changed_before_their_module_uses_them():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(3))(x)

    with pytest.raises(ValueError, match=r"WeightNorm.__call__ \(WeightNorm_0\) changes"):
        call_model(Net(), activations(ROWS, FEATURES))


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

    message = r"BatchNorm.__call__ \(BatchNorm_0\).*mixes the rows.*_average=True\.(\n|$)"
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
    with pytest.raises(ValueError, match=r"Norm.__call__ \(layers_1\).*it mixes rows"):
        call_model(model, activations(ROWS, POSITIONS, FEATURES))


def test_a_group_norm_that_finds_rows_elsewhere_than_in_front():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.swapaxes(nn.GroupNorm(2)(jnp.swapaxes(x, 0, 1)), 0, 1)

    with pytest.raises(ValueError, match=r"GroupNorm.__call__.*axis 1 indexes the rows"):
        call_model(Net(), activations(ROWS, POSITIONS, FEATURES))


def test_a_module_that_writes_and_owns():
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            count = self.variable("state", "count", lambda: jnp.zeros(()))
            if self.is_mutable_collection("state"):
                count.value = count.value + 1
            return x * scale * (1 + count.value)

    batch = activations(ROWS, FEATURES)

    def loss_fn(params, batch):
        variables = {"params": params, "state": {"count": jnp.zeros(())}}
        return squared(Writes().apply(variables, batch, mutable=["state"])[0])

    with pytest.raises(ValueError, match="writes variables in the same call"):
        call(loss_fn, {"scale": jnp.ones(())}, batch)


@pytest.mark.parametrize("used", [True, False])
def test_a_sown_value_made_of_a_parameter(used):
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            self.sow("intermediates", "scaled", scale * 2)
            return x * scale

    def loss_fn(params, batch):
        outputs, state = Sows().apply({"params": params}, batch, mutable=["intermediates"])
        return squared(outputs) + (state["intermediates"]["scaled"][0] if used else 0.0)

    params, batch = {"scale": jnp.ones(())}, activations(ROWS, FEATURES)
    if used:
        with pytest.raises(
            ValueError, match=r"\['scale'\]: what its module makes of it is used out"
        ):
            call(loss_fn, params, batch)
    else:
        assert np.isfinite(call(loss_fn, params, batch).dots["scale"]).all()


def test_a_module_inside_a_custom_rule():
    model = nn.Dense(FEATURES)

    @jax.custom_jvp
    def apply(params, x):
        return model.apply({"params": params}, x)

    @apply.defjvp
    def _(primals, tangents):
        return jax.jvp(apply.fun, primals, tangents)

    batch = activations(ROWS, FEATURES)
    with pytest.raises(ValueError, match="inside a custom_jvp or custom_vjp function"):
        call(lambda p, x: squared(apply(p, x)), perturbed(model, batch), batch)


def test_a_loss_that_depends_on_the_number_of_rows():
    model = nn.Dense(3)
    batch = activations(ROWS, FEATURES)
    weights = jnp.ones((ROWS, 1))

    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch) * weights)

    with pytest.raises(ValueError, match=r"with 7 rows but not with 14.*come in through batch"):
        call(loss_fn, perturbed(model, batch), batch)


def test_calls_that_depend_on_the_number_of_rows():
    model = nn.Dense(3)
    batch = activations(ROWS, FEATURES)

    def loss_fn(params, batch):
        calls = len(batch) // ROWS
        return sum(squared(model.apply({"params": params}, batch)) for _ in range(calls))

    with pytest.raises(ValueError, match="calls different modules for 7 and for 14 rows"):
        call(loss_fn, perturbed(model, batch), batch)


def test_calls_that_change_between_traces():
    model, other = nn.Dense(3), nn.Sequential([nn.Dense(3)])
    batch = activations(ROWS, FEATURES)
    traces = []

    def loss_fn(params, batch):
        traces.append(None)
        params = {"params": params} if len(traces) < 3 else {"params": {"layers_0": params}}
        return squared((model if len(traces) < 3 else other).apply(params, batch))

    with pytest.raises(ValueError, match="must make the same calls every time it is traced"):
        call(loss_fn, perturbed(model, batch), batch)


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


def test_a_scan_axis_counted_from_the_back():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.vmap(
                nn.Dense,
                variable_axes={"params": -1},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=1,
                axis_size=2,
            )
            return stack(3)(x)

    with pytest.raises(ValueError, match="counted from the front"):
        call_model(Net(), activations(ROWS, FEATURES))
