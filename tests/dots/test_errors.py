"""What value_grad_and_dots refuses, and the certificate."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax import conservation_error, value_grad_and_dots
from ghostjax._walk import _walk
from tests.dots.checks import DENSE, X, dense, direction_like, mean_squares

MIXING = {
    "batch_norm": lambda p, x: dense(p, x) - dense(p, x).mean(0, keepdims=True),
    "batch_norm_jitted": lambda p, x: jax.jit(lambda h: h - h.mean(0, keepdims=True))(dense(p, x)),
    "contrastive": lambda p, x: jax.nn.log_softmax(dense(p, x) @ dense(p, x).T),
    "sorted": lambda p, x: jnp.sort(dense(p, x), axis=0) @ p["w"].T,
    "reversed": lambda p, x: dense(p, x)[::-1] @ p["w"].T,
    "rolled": lambda p, x: jnp.roll(dense(p, x), 1, axis=0) @ p["w"].T,
    "gathered": lambda p, x: dense(p, x)[jnp.array([1, 0, 2, 3, 5, 4])] @ p["w"].T,
    "looped_over_rows": lambda p, x: jax.lax.map(lambda row: row @ p["w"], x),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_rows_are_an_error_that_names_the_place(name):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(jnp.square(MIXING[name](p, x))))
    with pytest.raises(ValueError, match=r"test_errors\.py:\d+(.|\n)*per_example=True"):
        fn(DENSE, X, direction=DENSE)


def test_a_missed_channel_shows_by_name(monkeypatch):
    def loss_fn(params, x):
        return jnp.mean(mean_squares(dense(params, x)))

    attach = _walk.attach_channel

    def all_but_one(outputs, tangents, *rest):
        tangents = {path: found for path, found in tangents.items() if "['b']" not in path}
        return attach(outputs, tangents, *rest)

    monkeypatch.setattr(_walk, "attach_channel", all_but_one)
    direction = direction_like(DENSE)
    result = value_grad_and_dots(loss_fn)(DENSE, X, direction=direction)
    errors = conservation_error(result, direction)
    assert errors["w"] <= 1e-5
    assert errors["b"] >= 0.99


def test_differentiating_the_dots_is_refused():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        jax.grad(lambda p: fn(p, X, direction=DENSE).total().sum())(DENSE)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"w": DENSE["w"]}, "direction must be a tree like the parameters"),
        ({**DENSE, "b": jnp.ones(3)}, r"\['b'\]: expected float32\[4\], found float32\[3\]"),
        ({**DENSE, "b": jnp.ones(4, jnp.bfloat16)}, r"found bfloat16\[4\]"),
    ],
)
def test_directions_that_do_not_fit(direction, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(dense(p, x)))
    with pytest.raises(ValueError, match=message):
        fn(DENSE, X, direction=direction)


def test_losses_that_are_not_scalars():
    fn = value_grad_and_dots(lambda p, x: mean_squares(dense(p, x)))
    with pytest.raises(ValueError, match=r"must return a scalar loss.*float32\[6\]"):
        fn(DENSE, X, direction=DENSE)


def test_loss_reduction_of_another_name():
    with pytest.raises(ValueError, match='must be "mean" or "sum", got \'max\''):
        value_grad_and_dots(lambda p, x: 0.0, loss_reduction="max")


def test_a_while_loop():
    def loss_fn(params, x):
        h = jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h * params["b"][None], x[:, :4])
        return jnp.mean(h)

    with pytest.raises(NotImplementedError, match=r"while at .*test_errors.py:\d+: a while loop"):
        value_grad_and_dots(loss_fn)(DENSE, X, direction=DENSE)


def test_what_cannot_be_walked_is_refused():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def loss_fn(params, x):
        run = jax.shard_map(dense, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        return jnp.mean(run(params, x))

    with pytest.raises(NotImplementedError, match=r"shard_map.*\['b'\].*cannot be walked"):
        value_grad_and_dots(loss_fn)(DENSE, X, direction=DENSE)
