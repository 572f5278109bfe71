"""Stacked directions, and directions known after the backward pass, against per-row autodiff."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ghostjax
from ghostjax import testing
from models.arrays import FEATURES, K, activations, directions_like, draw, mean_squares
from models.flax import MODELS, ROUNDED
from models.functions import FUNCTIONS
from tests.dots.checks import DENSE, X, dense, expected_stacked
from tests.dots.test_per_example import LOSSES, PARAMS
from tests.variants import crossed


def late(loss_fn, **settings):
    """``(params, batch, direction) -> GradDots``, with the direction hidden until the end."""

    def result(params, batch, direction):
        _, _, dots = ghostjax.value_and_dots_fn(loss_fn, **settings)(params, batch)
        return dots.result(direction)

    return result


def early(loss_fn, **settings):
    fn = ghostjax.value_grad_and_dots(loss_fn, **settings)
    return lambda params, batch, direction: fn(params, batch, direction=direction)


FORMS = {"early": early, "late": late, "remat": functools.partial(late, remat=True)}


def check(results, expected, directions):
    """Dots, totals and certificates of ``results``, and that of wrong dots."""
    for result in results:
        testing.assert_dots_close(result.dots, expected, rtol=1e-5)
        total = sum(jax.tree.leaves(expected))
        assert result.total().shape == total.shape
        testing.assert_dots_close(result.total(), total, rtol=1e-5)
        for leaf in jax.tree.leaves(ghostjax.conservation_error(result, directions)):
            assert leaf.shape == (K,)
            assert leaf.max() <= 1e-5


@pytest.mark.quick("einsum_of_three")
@pytest.mark.parametrize("name", [*FUNCTIONS, "gpt2", "gpt2_scan_remat"])
def test_stacked_directions(name, standard_promotion):
    losses, params, batch = (FUNCTIONS | MODELS)[name]()

    def loss_fn(params, batch):
        return jnp.mean(losses(params, batch))

    @jax.jit
    def run(params, batch, directions):
        return [make(loss_fn)(params, batch, directions) for make in (early, late)]

    directions = directions_like(params)
    results = run(params, batch, directions)
    check(results, expected_stacked(losses, params, batch, directions), directions)
    value, grads = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    for result in results:
        if name in ROUNDED or "checkpoint" in name:
            testing.assert_dots_close((result.value, result.grads), (value, grads), rtol=1e-6)
        else:
            chex.assert_trees_all_equal((result.value, result.grads), (value, grads))


@pytest.mark.parametrize(("loss", "form"), crossed(LOSSES, FORMS))
def test_stacked_directions_of_a_loss_of_one_row(loss, form):
    x, directions = activations(), directions_like(PARAMS)
    run = jax.jit(FORMS[form](loss, per_example=True))
    expected = expected_stacked(jax.vmap(loss, (None, 0)), PARAMS, x, directions)
    check([run(PARAMS, x, directions)], expected, directions)


def dense_losses(params, x):
    return mean_squares(dense(params, x))


def dense_loss(params, x):
    return jnp.mean(dense_losses(params, x))


@pytest.mark.parametrize("form", FORMS)
def test_branches_on_activations(form):
    """What ``jax.vmap`` over directions cannot: a branch that all rows take together."""

    def loss_fn(params, x):
        h = dense(params, x)
        return jnp.mean(
            jax.lax.cond(jnp.max(x) > 0, jnp.sin, jnp.cos, jnp.sum(h, 1) * params["b"][:1])
        )

    def losses(params, x):
        return jnp.sin(jnp.sum(dense(params, x), 1) * params["b"][:1])

    directions = directions_like(DENSE)
    expected = expected_stacked(losses, DENSE, X, directions)
    check([jax.jit(FORMS[form](loss_fn))(DENSE, X, directions)], expected, directions)


@pytest.mark.parametrize("remat", [False, True])
def test_a_direction_made_of_the_gradient(remat):
    """One and several, inside the jit that made the dots and outside of it."""
    fn = ghostjax.value_and_dots_fn(dense_loss, remat=remat)

    @jax.jit
    def step(params, x):
        value, grads, dots = fn(params, x)
        return value, grads, dots, dots(jax.tree.map(jnp.sin, grads))

    value, grads, dots, found = step(DENSE, X)
    plain = jax.jit(jax.value_and_grad(dense_loss))(DENSE, X)
    chex.assert_trees_all_equal((value, grads), plain)
    directions = jax.tree.map(
        lambda several, grad: several.at[0].set(jnp.sin(grad)), directions_like(DENSE), grads
    )
    expected = expected_stacked(dense_losses, DENSE, X, directions)
    for result in (found, dots(jax.tree.map(jnp.sin, grads))):
        testing.assert_dots_close(result, jax.tree.map(lambda leaf: leaf[0], expected))
    testing.assert_dots_close(dots(directions), expected)
    testing.assert_dots_close(jax.vmap(dots)(directions), expected)


@pytest.mark.parametrize("form", FORMS)
def test_arguments_in_any_place_and_aux(form):
    def loss_fn(scale, x, key, w, b, *, shift, name="unused"):
        noise = jax.random.normal(key, x.shape)
        losses = dense_losses({"w": w, "b": b}, x + noise) * scale + shift
        return jnp.sum(losses), {"noise": noise}

    settings = {"argnums": (3, 4), "has_aux": True, "loss_reduction": "sum"}
    args = 2.0, X, jax.random.key(0), DENSE["w"], DENSE["b"]
    directions = directions_like((DENSE["w"], DENSE["b"]))
    if form == "early":
        fn = ghostjax.value_grad_and_dots(loss_fn, **settings)
        result = fn(*args, shift=0.5, name="x", direction=directions)
        outputs, grads = (result.value, result.aux), result.grads
    else:
        fn = ghostjax.value_and_dots_fn(loss_fn, **settings, remat=form == "remat")
        outputs, grads, dots = fn(*args, shift=0.5, name="x")
        result = dots.result(directions)
        chex.assert_trees_all_equal((result.value, result.aux, result.grads), (*outputs, grads))
    plain = jax.value_and_grad(loss_fn, argnums=(3, 4), has_aux=True)
    (value, aux), expected_grads = plain(*args, shift=0.5)
    chex.assert_trees_all_close((outputs, grads), ((value, aux), expected_grads))

    def losses(params, x):
        return 2 * dense_losses(dict(zip("wb", params)), x + aux["noise"])

    expected = expected_stacked(losses, (DENSE["w"], DENSE["b"]), X, directions)
    check([result], expected, directions)


def test_what_belongs_to_no_row():
    """Weight decay in the loss is in ``shared``, of every direction."""
    directions = directions_like(DENSE)

    def loss_fn(params, x):
        return dense_loss(params, x) + 0.1 * jnp.sum(params["w"] ** 2)

    expected = expected_stacked(dense_losses, DENSE, X, directions)
    results = [jax.jit(make(loss_fn))(DENSE, X, directions) for make in FORMS.values()]
    check(results, expected, directions)
    decay = 0.2 * np.tensordot(directions["w"], DENSE["w"], axes=2)
    for result in results:
        np.testing.assert_allclose(result.shared["w"], decay, rtol=1e-5)
        np.testing.assert_array_equal(result.shared["b"], np.zeros(K))


def test_the_certificate_names_parameter_and_direction():
    directions = directions_like(DENSE)
    result = late(dense_loss)(DENSE, X, directions)
    result.dots["b"] = result.dots["b"].at[1].multiply(2)
    errors = ghostjax.conservation_error(result, directions)
    assert errors["b"][1] > 0.1
    assert max(*errors["w"], *errors["b"][::2]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_directions_that_do_not_fit(form):
    run, several = FORMS[form](dense_loss), directions_like(DENSE)
    other = directions_like(DENSE, K + 1)
    for direction in (
        {"w": several["w"], "b": DENSE["b"]},
        {"w": several["w"], "b": other["b"]},
        jax.tree.map(lambda leaf: leaf[:0], several),
        jax.tree.map(lambda leaf: leaf[None], several),
    ):
        with pytest.raises(ValueError, match=r"one more axis in front, of K directions"):
            run(DENSE, X, direction)


@pytest.mark.parametrize(("axis_type", "form"), crossed([AxisType.Auto, AxisType.Explicit], FORMS))
def test_a_batch_sharded_over_devices(axis_type, form):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    params, x = {"w": draw(FEATURES, 16), "b": draw(16)}, draw(16, FEATURES, seed=1)
    directions = directions_like(params)
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    args = jax.device_put((params, x, directions), (whole, rows, whole))
    result = jax.jit(FORMS[form](dense_loss))(*args)
    testing.assert_dots_close(result.dots, expected_stacked(dense_losses, params, x, directions))
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    for leaf in (*jax.tree.leaves(result.dots), result.total()):
        assert leaf.sharding.is_equivalent_to(split, leaf.ndim)
