"""What an engine made for layers could not take apart, and this one does, exactly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine, testing, value_grad_and_dots
from models.modules.table import FEATURES, activations, ids, perturbed, squared
from tests.linen.checks import check

ROWS, POSITIONS = 7, 5
TAKEN = {}


def taken(build):
    """Each builds (loss_fn, params, batch, further arguments...)."""
    TAKEN[build.__name__] = build
    return build


def of_model(model, batch=None, **kwargs):
    batch = activations(ROWS, POSITIONS, FEATURES) if batch is None else batch

    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch, **kwargs))

    return loss_fn, perturbed(model, batch), batch


def of_outputs(outputs):
    """Those of a Dense layer's parameters and [N, T, F]."""
    batch = activations(ROWS, POSITIONS, FEATURES)
    return lambda params, x: squared(outputs(params, x)), perturbed(DENSE, batch), batch


DENSE = nn.Dense(3)
MADE_FOR_ROWS = jnp.linspace(0.5, 2, ROWS)[:, None, None]


def dense(params, x):
    return DENSE.apply({"params": params}, x)


# Of layers.


@taken
def merged_axes():
    return of_outputs(lambda p, x: dense(p, x.reshape(-1, FEATURES)).reshape(*x.shape[:2], 3))


@taken
def read_from_the_tree():
    return of_outputs(lambda p, x: dense(p, x) @ p["kernel"].T)


@taken
def changed():
    return of_outputs(lambda p, x: dense(jax.tree.map(jnp.sin, p), x))


@taken
def doubled():
    return of_outputs(lambda p, x: dense(jax.tree.map(lambda leaf: leaf * 2, p), x))


@taken
def constant_with_rows():
    return of_outputs(lambda p, x: dense(p, x) * MADE_FOR_ROWS)


@taken
def vmap_over_rows():
    return of_outputs(lambda p, x: jax.vmap(lambda row: dense(p, row))(x))


@taken
def calls_for_every_so_many_rows():
    return of_outputs(lambda p, x: sum(dense(p, x) for _ in range(len(x) // ROWS)))


@taken
def inside_a_custom_rule():
    @jax.custom_jvp
    def apply(params, x):
        return dense(params, x)

    @apply.defjvp
    def _(primals, tangents):
        return jax.jvp(apply.fun, primals, tangents)

    return of_outputs(apply)


@taken
def gradient_inside_the_loss():
    model = nn.Sequential([nn.Dense(5), nn.tanh, nn.LayerNorm(), nn.Dense(3)])
    _, params, batch = of_model(model, activations(ROWS, FEATURES))

    def loss_fn(params, batch):
        return squared(jax.grad(lambda x: model.apply({"params": params}, x).sum())(batch))

    return loss_fn, params, batch


@taken
def weight_decay_inside_the_loss():
    loss_fn, params, batch = of_model(DENSE)

    def with_decay(params, batch):
        decay = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        return loss_fn(params, batch) + decay

    return with_decay, params, batch


def positions_without_a_row_axis(positions):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, FEATURES, name="tokens")(tokens)
            x = x + nn.Embed(16, FEATURES, name="positions")(jnp.arange(tokens.shape[1]))[None]
            return nn.Dense(3)(x)

    return of_model(Net(), ids(ROWS, positions))


@taken
def positions_without_a_row_axis_as_many_as_rows():
    return positions_without_a_row_axis(ROWS)


@taken
def positions_without_a_row_axis_fewer():
    return positions_without_a_row_axis(POSITIONS)


@taken
def a_bare_parameter_beside_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            token = self.param("class_token", nn.initializers.normal(), (1, 1, FEATURES))
            token = jnp.broadcast_to(token, (x.shape[0], 1, FEATURES))
            return nn.Dense(3)(jnp.concatenate([token, x], axis=1))

    return of_model(Net())


@taken
def a_tied_table_read_from_its_module():
    class Net(nn.Module):
        def setup(self):
            self.embed = nn.Embed(11, FEATURES)

        def __call__(self, tokens):
            return self.embed(tokens) @ self.embed.embedding.T

    return of_model(Net(), ids(ROWS, POSITIONS))


@taken
def a_table_read_from_the_tree():
    model = nn.Embed(11, FEATURES)
    _, params, batch = of_model(model, ids(ROWS, POSITIONS))

    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch) @ params["embedding"].T)

    return loss_fn, params, batch


@taken
def rows_merged_inside_a_module():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(-1, FEATURES)).reshape(*x.shape[:2], 3)

    return of_model(Net())


@taken
def weights_changed_before_their_module_uses_them():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(3))(x)

    return of_model(Net())


@taken
def a_module_that_writes_and_owns():
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            count = self.variable("state", "count", lambda: jnp.zeros(()))
            if self.is_mutable_collection("state"):
                count.value = count.value + 1
            return x * scale * (1 + count.value)

    def loss_fn(params, batch):
        variables = {"params": params, "state": {"count": jnp.zeros(())}}
        return squared(Writes().apply(variables, batch, mutable=["state"])[0])

    return loss_fn, {"scale": jnp.float32(1.2)}, activations(ROWS, FEATURES)


def a_sown_value(used):
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            self.sow("intermediates", "scaled", scale * 2)
            return x * scale

    def loss_fn(params, batch):
        outputs, state = Sows().apply({"params": params}, batch, mutable=["intermediates"])
        return squared(outputs) + (state["intermediates"]["scaled"][0] if used else 0.0)

    return loss_fn, {"scale": jnp.float32(1.2)}, activations(ROWS, FEATURES)


@taken
def a_sown_value_that_is_used():
    return a_sown_value(True)


@taken
def a_sown_value_that_is_not_used():
    return a_sown_value(False)


@taken
def a_scan_axis_counted_from_the_back():
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

    return of_model(Net())


class Own(nn.Module):
    """A bare parameter and a function of the input and of it."""

    function: object

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (FEATURES, 3))
        return self.function(x, kernel)


KERNEL = {"kernel": jnp.asarray(activations(FEATURES, 3))}


@taken
def a_closure_that_carries_a_parameter_out_of_its_module():
    def with_closure(x, w):
        scaled = w / jnp.linalg.norm(w)
        return jnp.sin(x @ scaled), lambda y: y @ scaled.T

    def loss_fn(params, batch):
        outputs, function = Own(with_closure).apply({"params": params}, batch)
        return squared(function(outputs))

    return loss_fn, KERNEL, activations(ROWS, FEATURES)


@taken
def complex_outputs():
    model = Own(lambda x, w: jax.lax.complex(x @ w, jnp.cos(x @ w)) * jnp.exp(1j * x[:, :3]))

    def loss_fn(params, batch):
        return squared(jnp.abs(model.apply({"params": params}, batch)))

    return loss_fn, KERNEL, activations(ROWS, FEATURES)


@pytest.mark.parametrize("name", TAKEN)
def test_is_exact(name, request):
    if name == "complex_outputs":
        request.getfixturevalue("standard_promotion")
    check(*TAKEN[name]())


@pytest.mark.parametrize(
    "name", ["merged_axes", "read_from_the_tree", "changed", "constant_with_rows"]
)
def test_value_grad_and_dots_takes_the_same(name):
    losses, params, batch = TAKEN[name]()
    fn = value_grad_and_dots(lambda params, batch: jnp.mean(losses(params, batch)))
    dots = jax.jit(fn)(params, batch, direction=params).dots
    rows = testing.per_example_grads(losses, params, batch)
    expected = jax.tree.map(lambda g, v: np.tensordot(g, v, axes=v.ndim), rows, params)
    testing.assert_dots_close(dots, expected)


def test_calls_that_change_between_traces():
    """There is but one."""
    model, other = nn.Dense(3), nn.Sequential([nn.Dense(4)])
    batch = activations(ROWS, FEATURES)
    params = perturbed(model, batch)
    traces = []

    def changing(params, batch):
        traces.append(None)
        params = {"params": params} if len(traces) == 1 else {"params": {"layers_0": params}}
        return squared((model if len(traces) == 1 else other).apply(params, batch))

    result = GradDotProdEngine(changing, val_batch_size=3)(params, batch)
    expected = GradDotProdEngine(
        lambda params, batch: squared(model.apply({"params": params}, batch)), val_batch_size=3
    )(params, batch)
    testing.assert_dots_close(result.dots, expected.dots)
    assert len(traces) == 1
