"""value_grad_and_dots inside other transformations, and its arguments."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax import testing, value_grad_and_dots
from models.arrays import FEATURES, ROWS, direction_like, draw, mean_squares
from tests.dots.checks import DENSE, X, dense, expected_dots


def mean_loss(params, x):
    return jnp.mean(mean_squares(dense(params, x)))


def dots_of(loss_fn, **settings):
    fn = value_grad_and_dots(loss_fn, **settings)
    return jax.jit(lambda params, batch, direction: fn(params, batch, direction=direction))


DIRECTION = direction_like(DENSE)


def test_stacked_directions():
    """vmap over directions repeats the tangent products, not the forward and backward pass."""
    width = 64
    params = {"w1": draw(width, width), "w2": draw(width, width)}
    x = draw(256, width)

    def loss_fn(params, x):
        return jnp.mean(mean_squares(jnp.tanh(x @ params["w1"]) @ params["w2"]))

    fn = value_grad_and_dots(loss_fn)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf, leaf**2]), params)

    def many(params, x, directions):
        run = jax.vmap(lambda v: fn(params, x, direction=v).dots)
        return run(directions)

    dots = jax.jit(many)(params, x, stacked)
    single = fn(params, x, direction=params).dots
    testing.assert_dots_close(jax.tree.map(lambda leaf: leaf[0], dots), single)
    testing.assert_dots_close(
        jax.tree.map(lambda leaf: leaf[1], dots), jax.tree.map(lambda leaf: 2 * leaf, single)
    )

    def flops(count):
        some = jax.tree.map(lambda leaf: leaf[:count], stacked)
        return jax.jit(many).lower(params, x, some).compile().cost_analysis()["flops"]

    product = 2 * 2 * 256 * width * width
    assert flops(4) - flops(1) <= 1.05 * 3 * product


def test_in_a_scan_over_microbatches():
    direction = direction_like(DENSE)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))

    @jax.jit
    def run(batches):
        def step(total, x):
            result = fn(DENSE, x, direction=direction)
            return jax.tree.map(jnp.add, total, result.grads), result.dots

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, DENSE), batches)

    _, dots = run(X.reshape(2, 3, FEATURES))
    joined = jax.tree.map(lambda leaf: leaf.reshape(-1), dots)
    testing.assert_dots_close(joined, fn(DENSE, X, direction=direction).dots)


@pytest.mark.slow
def test_arguments_in_any_place_and_aux():
    def loss_fn(scale, x, key, params, *, shift, name="unused"):
        noise = jax.random.normal(key, x.shape)
        losses = mean_squares(dense(params, x + noise)) * scale + shift
        return jnp.mean(losses), {"noise": noise}

    key = jax.random.key(0)
    direction = direction_like(DENSE)
    fn = value_grad_and_dots(loss_fn, argnums=3, batch_argnums=1, has_aux=True)
    result = fn(2.0, X, key, DENSE, shift=0.5, direction=direction, name="x")
    plain = jax.value_and_grad(loss_fn, argnums=3, has_aux=True)
    (value, aux), grads = plain(2.0, X, key, DENSE, shift=0.5)
    chex.assert_trees_all_close((result.value, result.aux, result.grads), (value, aux, grads))

    def rows(params, x):
        return 2 * mean_squares(dense(params, x + aux["noise"]))

    testing.assert_dots_close(result.dots, expected_dots(rows, DENSE, X, direction))


def test_several_parameter_arguments():
    def loss_fn(w, x, b):
        return jnp.mean(mean_squares(jnp.tanh(x @ w + b[None])))

    fn = value_grad_and_dots(loss_fn, argnums=(0, 2))
    w, b = DENSE["w"], DENSE["b"]
    result = fn(w, X, b, direction=(w, b))
    single = value_grad_and_dots(lambda p, x: loss_fn(p["w"], x, p["b"]))(DENSE, X, direction=DENSE)
    testing.assert_dots_close(list(result.dots), [single.dots["w"], single.dots["b"]])


def test_dots_lower_for_accelerators():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))
    jitted = jax.jit(lambda p, x, v: fn(p, x, direction=v).dots)
    exported = jax.export.export(jitted, platforms=["tpu", "cuda"])(DENSE, X, DENSE)
    assert exported.platforms == ("tpu", "cuda")


def test_training_steps_are_unchanged(standard_promotion):
    """AdamW with donated parameters and state: bit for bit the parameters of the plain step."""
    optimizer = optax.adamw(1e-2)
    val = draw(3, FEATURES, seed=5)
    fn = value_grad_and_dots(mean_loss)

    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def plain(params, state, x):
        _, grads = jax.value_and_grad(mean_loss)(params, x)
        return update(params, state, grads)

    def step(params, state, x):
        result = fn(params, x, direction=jax.grad(mean_loss)(params, val))
        return *update(params, state, result.grads), result.dots

    donating, keeping = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    expected, expected_state = DENSE, optimizer.init(DENSE)
    params, state = jax.tree.map(jnp.copy, (expected, expected_state))
    for round_ in range(3):
        x = draw(ROWS, FEATURES, seed=10 + round_)
        dots = keeping(params, state, x)[2]
        given = params
        params, state, found = donating(params, state, x)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        chex.assert_trees_all_equal(found, dots)
        expected, expected_state = plain(expected, expected_state, x)
        chex.assert_trees_all_equal((params, state), (expected, expected_state))


def test_jit_of_the_function_itself():
    """Static and donated arguments by name: fn has loss_fn's signature, and direction."""

    def loss_fn(params, x, *, squared):
        return jnp.mean(jnp.square(dense(params, x)) if squared else dense(params, x))

    fn = value_grad_and_dots(loss_fn)
    jitted = jax.jit(fn, static_argnames="squared", donate_argnames="direction")
    results = [
        jitted(DENSE, X, squared=squared, direction=direction_like(DENSE))
        for squared in (True, False)
    ]
    testing.assert_dots_close(results[0].dots, dots_of(mean_loss)(DENSE, X, DIRECTION).dots)
    assert results[0].value != results[1].value


def test_nested_in_checkpoint():
    def objective(params, x, direction):
        result = value_grad_and_dots(mean_loss)(params, x, direction=direction)
        return result.value, result.grads, result.dots

    found = jax.jit(jax.checkpoint(objective))(DENSE, X, DIRECTION)
    chex.assert_trees_all_close(found, jax.jit(objective)(DENSE, X, DIRECTION), rtol=1e-6)


class Model:
    def loss(self, params, x):
        return mean_loss(params, x)

    __call__ = loss


@pytest.mark.parametrize(
    "loss_fn",
    [
        jax.checkpoint(mean_loss),
        jax.jit(mean_loss),
        jax.jit(jax.checkpoint(jax.jit(mean_loss))),
        functools.partial(lambda scale, params, x: scale * mean_loss(params, x), 1.0),
        Model().loss,
        Model(),
    ],
    ids=["checkpoint", "jit", "jit_of_checkpoint", "partial", "bound_method", "callable_object"],
)
def test_losses_that_are_not_plain_functions(loss_fn):
    result = dots_of(loss_fn)(DENSE, X, DIRECTION)
    expected = dots_of(mean_loss)(DENSE, X, DIRECTION)
    testing.assert_dots_close(result.dots, expected.dots)
    chex.assert_trees_all_close(result.grads, expected.grads, rtol=1e-5)


def test_how_often_the_loss_is_traced():
    """Once for one compilation, and never again for the same shapes; without jit, once a call."""
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(mean_loss, n=1)
    jitted = dots_of(traced)
    for seed in range(3):
        jitted(DENSE, draw(ROWS, FEATURES, seed=seed), direction_like(DENSE))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        jitted(DENSE, X[:2], DIRECTION)

    calls = []
    fn = value_grad_and_dots(lambda p, x: (calls.append(None), mean_loss(p, x))[1])
    for _ in range(2):
        fn(DENSE, X, direction=DIRECTION)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("axis_type", "sharded"),
    [(AxisType.Auto, False), (AxisType.Auto, True), (AxisType.Explicit, False)],
    ids=["replicated", "sharded_parameters", "explicit_axes"],
)
def test_a_batch_sharded_over_devices(axis_type, sharded):
    """Dots come out sharded as the rows are."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {"w": draw(8, 16), "b": draw(16)}
    direction, x = direction_like(params), draw(16, 8, seed=1)
    expected = dots_of(mean_loss)(params, x, direction)

    place = split if sharded else whole
    result = dots_of(mean_loss)(*jax.device_put((params, x, direction), (place, split, place)))
    testing.assert_dots_close(result.dots, expected.dots)
    # Devices add up their rows first, so that sums that cancel are rounded otherwise.
    testing.assert_dots_close(result.grads, expected.grads, rtol=1e-6)
    for leaf in (*jax.tree.leaves(result.dots), result.total()):
        assert leaf.sharding.is_equivalent_to(split, leaf.ndim)


def test_an_ensemble_of_parameters():
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf**2]), DENSE)
    fn = value_grad_and_dots(mean_loss)
    run = jax.jit(jax.vmap(lambda params: fn(params, X, direction=DIRECTION).dots))
    dots = run(ensemble)
    single = dots_of(mean_loss)
    for member in range(3):
        params, found = jax.tree.map(operator.itemgetter(member), (ensemble, dots))
        testing.assert_dots_close(found, single(params, X, DIRECTION).dots)


@pytest.mark.parametrize("loop", ["fori", "while", "scan"])
def test_training_inside_a_loop(loop):
    fn = value_grad_and_dots(mean_loss)

    def step(params, total):
        result = fn(params, X, direction=DIRECTION)
        params = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, result.grads)
        return params, total + result.total()

    def run(params):
        start = params, jnp.zeros(ROWS)
        if loop == "fori":
            return jax.lax.fori_loop(0, 3, lambda _, carry: step(*carry), start)
        if loop == "while":
            return jax.lax.while_loop(
                lambda carry: carry[0] < 3,
                lambda carry: (carry[0] + 1, step(*carry[1])),
                (0, start),
            )[1]
        return jax.lax.scan(lambda carry, _: (step(*carry), None), start, None, length=3)[0]

    expected = DENSE, jnp.zeros(ROWS)
    once = jax.jit(step)
    for _ in range(3):
        expected = once(*expected)
    chex.assert_trees_all_close(jax.jit(run)(DENSE), expected, rtol=1e-5)


def test_straight_through_weights():
    """Rounded weights whose gradient goes past the rounding, by a custom_vjp function."""

    @jax.custom_vjp
    def rounded(w):
        return jnp.round(4 * w) / 4, jnp.argmax(jnp.abs(w))

    rounded.defvjp(lambda w: (rounded(w), None), lambda _, cotangents: (cotangents[0],))

    def row_losses(params, x):
        first, largest = rounded(params["w"])
        second, _ = jax.jit(rounded)(first.T)
        return mean_squares(jnp.tanh(x @ first) @ second) * largest.astype(jnp.float32)

    params = {"w": DENSE["w"]}
    direction = direction_like(params)
    result = dots_of(lambda p, x: jnp.mean(row_losses(p, x)))(params, X, direction)
    testing.assert_dots_close(result.dots, expected_dots(row_losses, params, X, direction))
