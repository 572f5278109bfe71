"""Derivative rules of functions of activations: rows that only a rule mixes are seen."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax import testing, value_grad_and_dots
from models.arrays import FEATURES, ROWS, activations, direction_like, draw, mean_squares
from tests.dots.checks import check, expected_dots
from tests.dots.rules import PARAMS
from tests.variants import crossed


def with_backward(function, backward, **settings):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *args: (function(*args), args), backward, **settings)
    return wrapped


def with_tangents(function, rule, **settings):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(rule, **settings)
    return wrapped


def centred(g):
    return g - g.mean(axis=0, keepdims=True)


def symbolic_backward(x):
    """Added to ones, by a rule that is told that they are constant."""

    def forward(x, y):
        assert x.perturbed
        assert not y.perturbed
        return x.value + y.value, None

    added = jax.custom_vjp(jnp.add)
    added.defvjp(forward, lambda _, g: (centred(g), jnp.zeros_like(g)), symbolic_zeros=True)
    return added(x, jnp.ones_like(x))


def symbolic_tangents(x):
    def rule(primals, tangents):
        assert isinstance(tangents[1], jax.custom_derivatives.SymbolicZero)
        return jnp.add(*primals), centred(tangents[0])

    return with_tangents(jnp.add, rule, symbolic_zeros=True)(x, jnp.ones_like(x))


MIXING = {
    "backward": with_backward(jnp.sin, lambda kept, g: (centred(g),)),
    "tangents": with_tangents(jnp.sin, lambda x, t: (jnp.sin(*x), centred(*t))),
    "backward_symbolic": symbolic_backward,
    "tangents_symbolic": symbolic_tangents,
    "reversed": with_backward(jnp.sin, lambda kept, g: (g[::-1],)),
    "transposed": with_backward(jnp.sin, lambda kept, g: (jnp.swapaxes(g, 0, 1),)),
    "one_cotangent_for_all": with_backward(
        jnp.sin, lambda kept, g: (jnp.broadcast_to(g.sum(0, keepdims=True), g.shape),)
    ),
    "looped": with_backward(
        jnp.sin,
        lambda kept, g: (jax.lax.fori_loop(0, 3, lambda _, g: centred(g), g),),
    ),
    "while": with_backward(
        jnp.sin,
        lambda kept, g: (
            jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, centred(c[1])), (0, g))[1],
        ),
    ),
}
PLACES = {
    "jit": lambda f, x: jax.jit(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "cond": lambda f, x: jax.lax.cond(True, f, jnp.sin, x),
    "scan": lambda f, x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=2)[0],
    "scanned_over": lambda f, x: jax.lax.scan(
        lambda total, x: (total + f(x)[:, 0], None), jnp.zeros(x.shape[::2]), x[None]
    )[0][:, None],
}


@pytest.mark.parametrize("name", MIXING)
def test_rules_that_mix_rows_of_activations(name):
    fn = value_grad_and_dots(
        lambda p, x: jnp.mean(jnp.square(MIXING[name](x @ p["w"]) @ p["head"]))
    )
    x = draw(ROWS, ROWS, FEATURES, seed=1)
    kind = "derivative" if "tangents" in name else "backward"
    way_out = r"(per_example=True|coupled=\"share\")"
    message = rf"in the {kind} rule of custom_\w\wp_call at .*:\d+.*: .*{way_out}"
    with pytest.raises(ValueError, match=message):
        fn(PARAMS, x, direction=PARAMS)


@pytest.mark.parametrize(
    ("place", "with_parameters", "kind"),
    crossed(PLACES, [False, True], ["backward", "tangents"]),
)
def test_rules_that_mix_rows_inside(place, with_parameters, kind):
    def loss_fn(params, x):
        def inside(x):
            if with_parameters:
                x = x * params["gain"][None, None]
            return MIXING[kind](x)

        return jnp.mean(jnp.square(PLACES[place](inside, x @ params["w"])))

    params = {"w": PARAMS["w"], "gain": draw(4)}
    with pytest.raises(ValueError, match=r"rule of custom_\w\wp_call.*rows are mixed"):
        value_grad_and_dots(loss_fn)(params, activations(), direction=params)


@pytest.mark.parametrize("name", [name for name in MIXING if "symbolic" not in name])
def test_rules_that_no_gradient_reaches(name):
    """Of data alone a rule may do what it likes."""
    f = MIXING[name]

    def losses(params, x):
        x = f(x) + jax.lax.scan(lambda x, _: (jax.jit(f)(x), None), x, None, length=2)[0]
        return mean_squares(f(jax.lax.stop_gradient(x @ params["w"])) @ params["head"] + x)

    params = {"w": draw(FEATURES, FEATURES), "head": draw(FEATURES, FEATURES, seed=2)}
    check(losses, params, draw(ROWS, ROWS, FEATURES, seed=1))


def test_a_derivative_rule_that_mixes_rows_of_what_a_parameter_does():
    @jax.custom_jvp
    def scaled(x, gain):
        return x * gain

    @scaled.defjvp
    def _(primals, tangents):
        x, gain = primals
        return x * gain, centred(tangents[0] * gain + x * tangents[1])

    def loss_fn(params, x):
        return jnp.mean(jnp.square(scaled(x, params["gain"])))

    params = {"gain": jnp.float32(1.5)}
    with pytest.raises(ValueError, match=r"in the derivative rule of custom_jvp_call at .*sub at"):
        value_grad_and_dots(loss_fn)(params, activations(), direction=params)


def test_one_row_mixes_with_no_other():
    def losses(params, x):
        h = MIXING["one_cotangent_for_all"](x @ params["w"])
        return mean_squares(MIXING["backward"](h.reshape(h.shape[1:])[None]) @ params["head"])

    x, direction = activations()[:1], direction_like(PARAMS)
    result = jax.jit(value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x))))(
        PARAMS, x, direction=direction
    )
    testing.assert_dots_close(result.dots, expected_dots(losses, PARAMS, x, direction))


@jax.custom_vjp
def mean_of_squares(x):
    """A loss with a rule, that adds up rows and gives every row its share."""
    return jnp.mean(jnp.square(x))


mean_of_squares.defvjp(lambda x: (mean_of_squares(x), x), lambda x, g: (2 * g * x / x.size,))


@jax.custom_jvp
def log_sum_exp(x):
    return jnp.log(jnp.sum(jnp.exp(x)))


@log_sum_exp.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return log_sum_exp(x), jnp.sum(t * jnp.exp(x - log_sum_exp(x)))


@pytest.mark.parametrize("reduce", [mean_of_squares, log_sum_exp])
def test_functions_that_mix_rows_after_the_last_parameter(reduce):
    """Against parameters of every row's own."""
    x, direction = activations(), direction_like(PARAMS)

    def loss_fn(params, x):
        return reduce(jnp.tanh(x @ params["w"]) @ params["head"])

    def moved(steps):
        w, head = (
            PARAMS[name][None] + steps[:, None, None] * direction[name][None] for name in PARAMS
        )
        return reduce(jnp.einsum("bti,bio->bto", jnp.tanh(jnp.einsum("bti,bio->bto", x, w)), head))

    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")
    result = jax.jit(fn)(PARAMS, x, direction=direction)
    expected = jax.jit(jax.grad(moved))(jnp.zeros(ROWS))
    testing.assert_dots_close(result.total(), expected)


def test_a_carry_through_which_gradient_flows_after_a_round():
    """It starts as a constant; only later rounds see rows that are mixed."""

    def loss_fn(params, x):
        def step(total, x):
            return total - total.mean(axis=0, keepdims=True) + x, None

        x = jnp.swapaxes(x @ params["w"], 0, 1)
        return jnp.mean(jnp.square(jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]))

    with pytest.raises(ValueError, match=r"sub at .*:\d+ combines rows with a value in which rows"):
        value_grad_and_dots(loss_fn)(PARAMS, activations(), direction=PARAMS)
