"""Ways in which a wrong number could come out without an error, each found once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from models.modules.table import activations, perturbed, squared
from tests.linen.checks import check

ROWS, FEATURES = 7, 4


def check_model(model, batch=None, **kwargs):
    batch = activations(ROWS, FEATURES) if batch is None else batch
    params = perturbed(model, batch)
    check(lambda p, b: squared(model.apply({"params": p}, b, **kwargs)), params, batch)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.tanh(nn.Dense(5)(x))))


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_a_jitted_teacher_of_the_same_architecture(warm):
    """Its trace is cached, so that its calls are not met every time."""
    batch = activations(ROWS, FEATURES)
    params = perturbed(Net(), batch)
    teacher = jax.tree.map(lambda leaf: leaf + 0.1, params)
    apply = jax.jit(lambda params, x: Net().apply({"params": params}, x))
    if warm:
        apply(teacher, batch)

    def loss_fn(params, batch, teacher):
        return squared(apply(params, batch) - apply(teacher, batch))

    check(loss_fn, params, batch, teacher)


def test_a_jitted_layer_without_parameters():
    norm = jax.jit(lambda x: nn.LayerNorm(use_scale=False, use_bias=False).apply({}, x))

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(norm(nn.Dense(5)(x)))

    check_model(Normed())


def test_super_calls():
    class Doubled(nn.Dense):
        def __call__(self, x):
            return 2.0 * super().__call__(x)

    class Squashed(nn.LayerNorm):
        def __call__(self, x):
            return jnp.tanh(super().__call__(x))

    check_model(nn.Sequential([Doubled(5), Squashed(), nn.Dense(2)]))


def test_functions_under_a_lifted_transform():
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x):
            def gate(module, x):
                return x * module.param("gate", nn.initializers.ones, (FEATURES,))[None]

            return nn.remat(gate)(self, x)

    check_model(nn.Sequential([Gated(), nn.Dense(2)]))


def test_an_interceptor_of_the_users():
    def tripled(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        return 3 * outputs if isinstance(context.module, nn.Dense) else outputs

    def loss_fn(params, batch):
        with nn.intercept_methods(tripled):
            return squared(Net().apply({"params": params}, batch))

    batch = activations(ROWS, FEATURES)
    check(loss_fn, perturbed(Net(), batch), batch)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (FEATURES, FEATURES))
        return jnp.sin((x + jax.random.normal(self.make_rng("noise"), x.shape)) @ kernel)


@pytest.mark.slow
def test_random_numbers_differ_between_calls_and_layers():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            noisy = Noisy()
            return noisy(x) - noisy(x)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                lambda module, x, _: (module(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "noise": True},
                length=2,
            )
            return layers(Noisy(), x, None)[0]

    batch = activations(ROWS, FEATURES)
    for model, shape in ((Twice(), (FEATURES, FEATURES)), (Stack(), (2, FEATURES, FEATURES))):
        key = jax.random.key(1)
        params = {"Noisy_0": {"kernel": jnp.asarray(activations(*shape))}}

        def loss_fn(params, batch, key, model=model):
            return squared(model.apply({"params": params}, batch, rngs={"noise": key}))

        check(loss_fn, params, batch, key)


class Own(nn.Module):
    """A bare parameter and a function of the input and of it."""

    function: object

    @nn.compact
    def __call__(self, x, *args):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (FEATURES, 3))
        return self.function(self, x, kernel, *args)


COUNTING = {
    "divided_by_rows": lambda m, x, w: jnp.sin(x @ w) / x.shape[0],
    "counted_rows": lambda m, x, w: jnp.sin(x @ w) * jnp.arange(x.shape[0], dtype=x.dtype)[:, None],
    "squeezed": lambda m, x, w: jnp.squeeze(jnp.sin(x @ w)),
}


@pytest.mark.parametrize("name", COUNTING)
def test_modules_that_use_the_number_of_rows(name):
    check_model(nn.Sequential([Own(COUNTING[name]), nn.tanh]))


def test_modules_that_look_for_a_key():
    def dropped(module, x, w):
        return nn.Dropout(0.5, deterministic=not module.has_rng("dropout"))(x @ w)

    key = jax.random.key(0)
    model = Own(dropped)
    check_model(model, rngs={"dropout": key})


def test_a_key_as_an_argument():
    model = Own(lambda module, x, w, key: jnp.sin((x + jax.random.normal(key, x.shape)) @ w))

    def loss_fn(params, batch, key):
        return squared(model.apply({"params": params}, batch, key))

    params = {"kernel": jnp.asarray(activations(FEATURES, 3))}
    check(loss_fn, params, activations(ROWS, FEATURES), jax.random.key(2))


@pytest.mark.parametrize("hidden", [4, 16])
def test_one_parameter_in_two_layouts(hidden):
    """A tied autoencoder; the wide one has its products over pairs of positions."""
    encoder = nn.Dense(hidden, use_bias=False)
    decoder = nn.Einsum((FEATURES, hidden), "bo,io->bi", use_bias=False)

    def loss_fn(params, batch):
        variables = {"params": {"kernel": params["kernel"]}}
        hidden = jnp.tanh(encoder.apply(variables, batch))
        return squared(decoder.apply(variables, hidden) - batch)

    params = {"kernel": jnp.asarray(activations(FEATURES, hidden))}
    check(loss_fn, params, activations(ROWS, FEATURES))


def test_another_output_used_in_each_run_of_a_jitted_call():
    model = Own(lambda module, x, w: (jnp.sin(x @ w), jnp.cos(x @ w)))
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x))

    def loss_fn(params, batch):
        return squared(apply(params, batch)[0]) + squared(apply(params, -2 * batch)[1])

    check(loss_fn, {"kernel": jnp.asarray(activations(FEATURES, 3))}, activations(ROWS, FEATURES))


def test_one_parameter_as_scale_and_bias():
    norm = nn.LayerNorm()

    def loss_fn(params, batch):
        variables = {"params": {"scale": params["both"], "bias": params["both"]}}
        return squared(norm.apply(variables, batch))

    check(loss_fn, {"both": jnp.linspace(0.5, 2, FEATURES)}, activations(ROWS, FEATURES))


def test_keyword_calls():
    class Keywords(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(x=nn.Dense(5)(inputs=x))

    check_model(Keywords())


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit])
def test_an_array_attribute_inside_a_transform(wrap):
    class Gate(nn.Module):
        gate: jax.Array

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(1.0), (FEATURES, 3))
            return jnp.sin(x @ kernel) * self.gate

    @wrap
    def apply(params, x, gate):
        return Gate(gate).apply({"params": params}, x)

    def loss_fn(params, batch):
        return squared(apply(params, batch["x"], batch["gate"]))

    batch = {"x": activations(ROWS, FEATURES), "gate": activations(ROWS, 1)}
    check(loss_fn, {"kernel": jnp.asarray(activations(FEATURES, 3))}, batch)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3])
def test_a_scan_of_the_users_over_stacked_parameters(length):
    layer = nn.Dense(FEATURES)

    def loss_fn(params, batch):
        def body(x, params):
            return jnp.tanh(layer.apply({"params": params}, x)), None

        return squared(jax.lax.scan(body, batch, params)[0])

    params = {
        "kernel": jnp.asarray(activations(length, FEATURES, FEATURES)),
        "bias": jnp.asarray(activations(length, FEATURES)),
    }
    check(loss_fn, params, activations(ROWS, FEATURES))
