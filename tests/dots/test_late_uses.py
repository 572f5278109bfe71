"""What late and stacked directions cost, and where else they are used: jit, loops, export."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import FEATURES, ROWS, direction_like, directions_like, draw, mean_squares
from tests.dots.checks import DENSE, X, check_late, dense, expected_dots, expected_stacked
from tests.variants import crossed

DIRECTION, DIRECTIONS = direction_like(DENSE), directions_like(DENSE)


def losses(params, x):
    return mean_squares(dense(params, x))


def loss_fn(params, x):
    return jnp.mean(losses(params, x))


def late(loss_fn, **settings):
    def run(params, batch, direction):
        return value_and_dots_fn(loss_fn, **settings)(params, batch)[2].result(direction)

    return run


def early(loss_fn, **settings):
    fn = value_grad_and_dots(loss_fn, **settings)
    return lambda params, batch, direction: fn(params, batch, direction=direction)


FORMS = {"early": early, "late": late, "remat": functools.partial(late, remat=True)}


def deep_loss(layers, params, x):
    """Tanh layers; ``layers`` says how they follow each other."""

    def layer(x, w):
        return jnp.tanh(x @ w)

    if layers == "unrolled":
        for w in params["layers"]:
            x = layer(x, w)
    else:
        if layers == "scan_remat":
            layer = jax.checkpoint(layer)
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
    return jnp.mean(mean_squares(x))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["unrolled", "scan", "scan_remat"])
def test_one_forward_and_one_backward_pass(layers):
    """Beside a plain step, one product for each direction, though they depend on the gradient."""
    depth, rows, width = 3, 16, 32
    params, x = {"layers": draw(depth, width, width)}, draw(rows, 8, width)
    loss = functools.partial(deep_loss, layers)

    def with_dots(params, x, remat=False):
        value, grads, dots = value_and_dots_fn(loss, remat=remat)(params, x)
        directions = jax.tree.map(lambda grad: jnp.stack([grad, jnp.cos(grad)]), grads)
        return value, grads, dots(directions)

    def figures(function):
        compiled = jax.jit(function).lower(params, x).compile()
        text = compiled.as_text()
        return compiled.cost_analysis()["flops"], text.count(" dot("), text.count(" tanh(")

    plain, late, twice = map(
        figures,
        (jax.value_and_grad(loss), with_dots, functools.partial(with_dots, remat=True)),
    )
    # XLA counts what is in a loop once.
    seen = depth if layers == "unrolled" else 1
    product = 2 * rows * 8 * width * width
    assert late[0] <= plain[0] + 1.1 * seen * 2 * product
    assert late[1] <= plain[1] + 2 * seen
    assert late[2] == plain[2]
    if layers != "unrolled":  # there XLA finds out by itself
        assert twice[1] > late[1]
        assert twice[0] > late[0] + product


def test_dots_leave_one_jit_and_enter_another():
    """With one trace of the loss and one of the contraction, however often they run."""
    chex.clear_trace_counter()
    step = jax.jit(value_and_dots_fn(chex.assert_max_traces(loss_fn, n=1)))
    contract = jax.jit(chex.assert_max_traces(lambda dots, direction: dots(direction), n=1))
    for seed in (1, 2):
        x = draw(ROWS, FEATURES, seed=seed)
        _, _, dots = step(DENSE, x)
        found = contract(dots, DIRECTIONS)
        testing.assert_dots_close(found, expected_stacked(losses, DENSE, x, DIRECTIONS))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(dots))


def test_the_loss_is_traced_once_a_call():
    calls = []
    fn = value_and_dots_fn(lambda p, x: (calls.append(None), loss_fn(p, x))[1])
    for _ in range(2):
        _, _, dots = fn(DENSE, X)
        dots(DIRECTION), dots(DIRECTIONS)
    assert len(calls) == 2


def test_nothing_leaks_from_a_trace():
    with jax.checking_leaks():
        for make in FORMS.values():
            jax.jit(make(loss_fn))(DENSE, X, DIRECTIONS)


def test_dots_out_of_a_loop_over_microbatches():
    def step(carry, x):
        return carry, value_and_dots_fn(loss_fn)(DENSE, x)[2]

    _, every = jax.jit(lambda xs: jax.lax.scan(step, None, xs))(X.reshape(2, 3, FEATURES))
    found = jax.jit(jax.vmap(lambda dots: dots(DIRECTION)))(every)
    joined = jax.tree.map(lambda leaf: leaf.reshape(-1), found)
    testing.assert_dots_close(joined, expected_dots(losses, DENSE, X, DIRECTION))


def test_an_ensemble_of_parameters():
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), DENSE)
    every = jax.jit(jax.vmap(lambda params: value_and_dots_fn(loss_fn)(params, X)[2]))(ensemble)
    found = jax.jit(jax.vmap(lambda dots: dots(DIRECTIONS)))(every)
    for member in range(2):
        params, dots = jax.tree.map(lambda leaf, k=member: leaf[k], (ensemble, found))
        testing.assert_dots_close(dots, expected_stacked(losses, params, X, DIRECTIONS))


def test_donated_parameters():
    """They may be given away to the step that makes the dots and the next parameters."""

    def step(params, x):
        _, grads, dots = value_and_dots_fn(loss_fn)(params, x)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads), dots

    given = jax.tree.map(jnp.copy, DENSE)
    _, dots = jax.jit(step, donate_argnums=0)(given, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    testing.assert_dots_close(dots(DIRECTION), expected_dots(losses, DENSE, X, DIRECTION))


@pytest.mark.parametrize("form", FORMS)
def test_lowering_for_accelerators(form):
    run = jax.jit(lambda *args: FORMS[form](loss_fn)(*args))
    exported = jax.export.export(run, platforms=["tpu", "cuda"])(DENSE, X, DIRECTIONS)
    assert exported.platforms == ("tpu", "cuda")


@pytest.mark.parametrize(
    ("dtypes", "form"), crossed([("float64", "float32"), ("float32", "float64")], FORMS)
)
def test_dots_have_the_width_of_their_parameter(dtypes, form, standard_promotion):
    of_params, of_data = dtypes
    with jax.enable_x64(True):
        given, directions = jax.tree.map(
            lambda leaf: np.asarray(leaf).astype(of_params), (DENSE, DIRECTIONS)
        )
        x = np.asarray(X).astype(of_data)

        def losses(params, x):
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
            return mean_squares(dense(params, x))

        run = jax.jit(FORMS[form](lambda params, x: jnp.mean(losses(params, x))))
        result = run(given, x, directions)
        testing.assert_dots_close(result.dots, expected_stacked(losses, given, x, directions))
        assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype(of_params)}


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, standard_promotion):
    """Dots are float32, as near to the rows' own gradients as bfloat16 allows."""
    params, x, directions = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), (DENSE, X, DIRECTIONS)
    )

    def losses(params, x):
        return mean_squares(dense(params, x)).astype(jnp.float32)

    run = jax.jit(FORMS[form](lambda params, x: jnp.mean(losses(params, x))))
    result = run(params, x, directions)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype(jnp.float32)}
    expected = expected_stacked(losses, params, x, directions)
    testing.assert_dots_close(result.dots, expected, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_comparisons_with_parameters(form):
    """A meeting through which no gradient flows."""

    def losses(params, x):
        h = x @ params["w"]
        return mean_squares(jnp.where(h > params["b"][None], h, 0.1 * h))

    run = jax.jit(FORMS[form](lambda params, x: jnp.mean(losses(params, x))))
    found = run(DENSE, X, DIRECTIONS).dots
    testing.assert_dots_close(found, expected_stacked(losses, DENSE, X, DIRECTIONS))


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """Two leaves that go by the same name."""

    def __init__(self, *leaves):
        self.leaves = leaves

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("w"), leaf) for leaf in self.leaves], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_one_name_have_dots_of_their_own(form):
    params = Twins(draw(FEATURES, FEATURES), draw(FEATURES, FEATURES, seed=2))

    def losses(params, x):
        first, second = params.leaves
        return mean_squares(jnp.tanh(x @ first) @ second)

    directions = directions_like(params)
    run = jax.jit(FORMS[form](lambda params, x: jnp.mean(losses(params, x))))
    result = run(params, X, directions)
    expected = expected_stacked(losses, params, X, directions)
    testing.assert_dots_close(list(result.dots.leaves), list(expected.leaves))
    errors = conservation_error(result, directions)
    assert max(leaf.max() for leaf in errors.leaves) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_keys(form):
    """Rows are told by their leading axis, whatever they are."""
    keys = jax.random.split(jax.random.key(0), ROWS)

    def losses(params, keys):
        return losses_of_noise(params, jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys))

    def losses_of_noise(params, x):
        return mean_squares(dense(params, x))

    run = jax.jit(FORMS[form](lambda params, keys: jnp.mean(losses(params, keys))))
    found = run(DENSE, keys, DIRECTION).dots
    testing.assert_dots_close(found, expected_dots(losses, DENSE, keys, DIRECTION))


def test_branches_that_are_not_taken_and_divide():
    """Their factors are zeros."""

    def losses(params, x):
        x = jax.lax.cond(
            params["b"].sum() > 99, lambda x: x / params["b"][None], lambda x: jnp.sin(x), x
        )
        return mean_squares(x @ params["w"])

    params = {"w": draw(4, 3), "b": draw(4, seed=2)}
    check_late(losses, params, draw(6, 4, seed=1))
