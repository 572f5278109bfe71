"""Small arrays as one vector, against the same derivatives of one array after another."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax._jaxprs import inner_jaxprs
from ghostjax._through import through_and_undefined
from ghostjax.core.place_rules import ELEMENTWISE
from ghostjax.runs.training import joined
from ghostjax.runs.training.joined import Apart, Joined, is_worth_joining
from ghostjax.runs.training.optimizers import ALIKE, treats_alike

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_joined_arrays_have_the_same_direction(monkeypatch):
    monkeypatch.setattr(joined, "SMALL", 8)
    rng = np.random.default_rng(0)

    def draw(*stacked):
        shapes = {"bias": (3,), "one": (), "matrix": (2, 4), "large": (3, 3)}
        tree = {n: jnp.float32(rng.normal(size=(*stacked, *own))) for n, own in shapes.items()}
        halves = {n: jnp.ones((*stacked, 2), jnp.float16) for n in ("half", "other")}
        return tree | halves

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    params, grads, val_grads = draw(), draw(), draw(2)
    grads["bias"] = grads["bias"].at[1].set(0)  # at the first step the update has no derivative
    opt_state = optimizer.init(params)
    inner = opt_state[1][0]._replace(nu=jax.tree.map(jnp.square, draw()))
    inner = inner._replace(mu=draw(), nu=inner.nu | {"bias": jnp.zeros(3)})
    opt_state = (opt_state[0], (inner, *opt_state[1][1:]))

    @jax.jit
    def both(opt_state, params, grads):
        found = []
        for arrays in (Apart(), Joined(params)):
            own = arrays.join_state(opt_state), arrays.join(params)
            own_grads = arrays.join(grads)
            updates, new_state = optimizer.update(own_grads, *own)
            through, undefined = through_and_undefined(optimizer, *own, own_grads)
            pulled = arrays.each(through, jax.vmap(arrays.join)(val_grads))
            new_state = arrays.split_state(new_state, opt_state)
            trees = jax.vmap(arrays.split)(pulled), arrays.split(updates), new_state
            found.append((trees, undefined))
        return found

    (expected, count), (found, found_count) = both(opt_state, params, grads)
    assert count == found_count == 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[:2]):
        assert np.abs(leaf).max() > 1e-3, path
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)
    kinds = sorted((own.shape, own.dtype.name) for own in joined.Joined(params).join(params))
    assert kinds == [((2,), "float16")] * 2 + [((3, 3), "float32"), ((12,), "float32")]


def test_what_has_nothing_to_join_is_left_alone():
    """A scalar alone looks like the count of steps in an optimizer's state."""
    assert is_worth_joining({"a": jnp.ones(3), "b": jnp.ones(2)})
    assert not is_worth_joining(jnp.float32(1))
    assert not is_worth_joining({"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)})


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        for inner, _ in inner_jaxprs(eqn):
            yield from primitives(inner)
        is_scalar = not eqn.invars or not getattr(eqn.invars[0].aval, "shape", ())
        if not inner_jaxprs(eqn) and not is_scalar:
            yield eqn.primitive.name


@pytest.mark.parametrize("name", sorted(ALIKE))
def test_optimizers_that_treat_all_coordinates_alike(name):
    """Nothing in their updates knows of two coordinates."""
    optimizer, params = getattr(optax, name)(0.1), jnp.ones((2, 3))
    state = optimizer.init(params)
    closed = jax.make_jaxpr(lambda *args: optimizer.update(*args)[0])(params, state, params)
    assert set(primitives(closed.jaxpr)) <= ELEMENTWISE


def test_others_are_not_joined():
    assert treats_alike("adamw(b2=0.95, weight_decay=0.1)")
    assert not treats_alike("adamw(mask={'bias': False, 'kernel': True})")
    assert not any(map(treats_alike, ["lamb", "adafactor", "contrib.muon"]))
