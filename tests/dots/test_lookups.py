"""Tables read and written at places out of range: the dots drop and clamp what gradients do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing, value_grad_and_dots
from ghostjax.core.lookups import promises
from models.arrays import FEATURES, direction_like, draw, mean_squares
from tests.dots.checks import check, one_by_one
from tests.variants import some_quick

SIZE = 7
# The table's size and more, and what is still negative after counting from the end.
IDS = jnp.array([[0, SIZE, 3, 6], [SIZE + 5, 2, 2, -100], [-1, 4, SIZE, 6], [1, 5, -8, 0]])
PARAMS = {"table": draw(SIZE, FEATURES), "w": draw(FEATURES, 3, seed=2)}
IN_RANGE = (IDS < SIZE) & (IDS >= -SIZE)

LOOKUPS = {
    "indexed": lambda table, ids: table[ids],
    "indexed_in_jit": lambda table, ids: jax.jit(lambda table, ids: table[ids])(table, ids),
    "indexed_in_checkpoint": lambda table, ids: jax.checkpoint(lambda t, i: t[i])(table, ids),
    "indexed_in_cond": lambda table, ids: jax.lax.cond(
        True, lambda t: t[ids], lambda t: t[ids] * 2, table
    ),
    "indexed_per_row": lambda table, ids: jax.vmap(lambda i: table[i])(ids),
    "indexed_in_a_scan": lambda table, ids: jnp.swapaxes(
        jax.lax.scan(lambda _, i: (None, table[i]), None, ids.T)[1], 0, 1
    ),
    "columns": lambda table, ids: jnp.moveaxis(table.T[:, ids], 0, -1),
    "after_a_cast": lambda table, ids: jnp.tanh(table)[ids],
    "filled": lambda table, ids: table.at[ids].get(mode="fill", fill_value=0),
    "clipped": lambda table, ids: table.at[ids].get(mode="clip"),
    "promised": lambda table, ids: table.at[ids].get(mode="promise_in_bounds"),
    "taken_filled": lambda table, ids: jnp.take(table, ids, axis=0, fill_value=0),
    "taken_clipped": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "taken_wrapped": lambda table, ids: jnp.take(table, ids, axis=0, mode="wrap"),
    "along_an_axis": lambda table, ids: jnp.take_along_axis(
        jnp.broadcast_to(table, (len(ids), *table.shape)),
        jnp.broadcast_to(ids[..., None], (*ids.shape, table.shape[1])),
        axis=1,
        mode="promise_in_bounds",
    ),
    "one_by_one": lambda table, ids: jax.vmap(jax.vmap(lambda i: table[i]))(ids),
    "sliced": lambda table, ids: jax.vmap(
        lambda i: jax.lax.dynamic_slice_in_dim(table, i[0], 3, axis=0)
    )(ids),
}
KINDS, MODES = ("add", "subtract", "set"), (None, "drop", "clip", "promise_in_bounds")
WRITES = {
    f"{kind}_{mode}": lambda table, ids, kind=kind, mode=mode: jax.vmap(
        lambda i: getattr(table.at[i], kind)(jnp.sin(table[0]), mode=mode)
    )(ids)
    for kind in KINDS
    for mode in MODES
    if (kind, mode) != ("set", "promise_in_bounds")
}
WRITES |= {
    "slice_updated": lambda table, ids: jax.vmap(
        lambda i: jax.lax.dynamic_update_slice_in_dim(table, jnp.sin(table[:2]), i[0], axis=0)
    )(ids)
}


def losses_with(lookup):
    def losses(params, ids):
        h = lookup(params["table"], ids).astype(params["w"].dtype)
        return mean_squares(jnp.tanh(h @ params["w"]) + 0.5)

    return losses


# Of writes, every kind and every mode; no look-up twice that is the same operation.
SLOW = {*WRITES, "indexed_in_jit", "one_by_one", "taken_filled", "taken_clipped"} - {
    "slice_updated", "add_None", "subtract_drop", "set_clip", "add_promise_in_bounds"
}  # fmt: skip


@pytest.mark.parametrize("name", some_quick([*LOOKUPS, *WRITES], lambda name: name not in SLOW))
def test_places_out_of_range(name):
    losses = losses_with((LOOKUPS | WRITES)[name])
    result = check(losses, PARAMS, IDS, exact_gradient="checkpoint" not in name)
    testing.assert_dots_close(result.dots, one_by_one(losses, PARAMS, IDS, direction_like(PARAMS)))


@pytest.mark.parametrize("name", ["indexed", "indexed_in_a_scan", "filled", "add_None"])
def test_places_out_of_range_per_example(name):
    losses, direction = losses_with((LOOKUPS | WRITES)[name]), direction_like(PARAMS)
    fn = value_grad_and_dots(lambda p, row: losses(p, row[None])[0], per_example=True)
    dots = jax.jit(fn)(PARAMS, IDS, direction=direction).dots
    testing.assert_dots_close(dots, one_by_one(losses, PARAMS, IDS, direction))


@pytest.mark.parametrize("name", ["indexed", "columns", "clipped"])
def test_places_out_of_range_in_bfloat16(name, standard_promotion):
    """Out of range no entry is added up twice, so that bfloat16 rounds both sides alike."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    direction = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), direction_like(PARAMS))
    losses = losses_with(LOOKUPS[name])
    fn = value_grad_and_dots(lambda p, b: jnp.sum(losses(p, b)), loss_reduction="sum")
    dots = jax.jit(fn)(params, IDS, direction=direction).dots
    testing.assert_dots_close(dots, one_by_one(losses, params, IDS, direction), rtol=1e-2)


def test_padded_embeddings():
    """nn.Embed fills what is out of range with NaN; what is masked has no gradient."""
    model = nn.Embed(SIZE, FEATURES)

    def losses(params, ids):
        h = jnp.where(IN_RANGE[: len(ids), :, None], model.apply(params, ids), 0.0)
        return mean_squares(jnp.tanh(h) + 0.5)

    ids = jnp.where(IN_RANGE, IDS, SIZE)
    check(losses, model.init(jax.random.key(0), ids), ids)


def test_positions_out_of_range():
    """A look-up of parameters alone, and one whose places and values come from a loop."""
    places = jnp.array([0, 5, SIZE, -100])

    def losses(params, x):
        def look_up(table, place):
            return jnp.roll(table, 1, axis=0), (table[place], place)

        _, (looped, _) = jax.lax.scan(look_up, params["table"], places)
        positions = params["table"][places] + jax.jit(lambda t, i: t[i])(params["table"], places)
        return mean_squares(jnp.tanh((x + (positions + looped)[None]) @ params["w"]))

    x = draw(4, len(places), FEATURES, seed=3)
    result = check(losses, PARAMS, x)
    expected = one_by_one(losses, PARAMS, x, direction_like(PARAMS))
    testing.assert_dots_close(result.dots, expected)


def test_a_derivative_rule_that_looks_up():
    @jax.custom_jvp
    def embed(table, ids):
        return table[ids]

    @embed.defjvp
    def _(primals, tangents):
        return embed(*primals), 2 * tangents[0][primals[1]]

    check(losses_with(embed), PARAMS, IDS)


def test_what_promises():
    def found(function):
        (eqn,) = jax.make_jaxpr(jax.jit(function))(PARAMS["table"], IDS).jaxpr.eqns
        return promises(eqn)

    assert found(LOOKUPS["indexed"])
    assert found(LOOKUPS["indexed_in_a_scan"])
    assert not found(LOOKUPS["clipped"])
    assert not found(lambda table, ids: jnp.take(table, ids, axis=0))
    assert np.all(
        np.isnan(jnp.take(PARAMS["table"], IDS, axis=0)[~np.asarray(IN_RANGE) & (IDS > 0)])
    )
