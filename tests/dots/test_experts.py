"""Mixtures of experts: tokens sent to experts and back, with one set of weights for every row in
the oracle."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import direction_like, draw

B, T, F, H, EXPERTS, CAPACITY, TILE = 3, 4, 5, 6, 3, 5, 32
PARAMS = {
    "in": draw(F, F, seed=5),
    "router": draw(F, EXPERTS),
    "up": draw(EXPERTS, F, H, seed=2),
    "down": draw(EXPERTS, H, F, seed=3),
}
X = draw(B, T, F, seed=1)
ROWS = jnp.repeat(jnp.arange(B), T)


class Shared:
    """Weights as a program has them."""

    def __init__(self, params):
        self.params = params

    def dense(self, h, name, rows):
        del rows
        return h @ self.params[name]

    def by_expert(self, h, name, rows):
        """h [E, C, d], rows [E, C]."""
        del rows
        return jnp.einsum("ecd,edf->ecf", h, self.params[name])

    def sorted(self, h, name, kinds, rows):
        """h [N, d] in the order of the experts."""
        del rows
        return jax.lax.ragged_dot(h, self.params[name], jnp.bincount(kinds, length=EXPERTS))


class OfEveryRow(Shared):
    """Weights that every row moves by itself along the direction."""

    def __init__(self, params, direction, steps):
        super().__init__(params)
        self.direction, self.steps = direction, steps

    def dense(self, h, name, rows):
        along = self.steps[name][rows][..., None] * (h @ self.direction[name])
        return super().dense(h, name, rows) + along

    def by_expert(self, h, name, rows):
        moved = jnp.einsum("ecd,edf->ecf", h, self.direction[name])
        return super().by_expert(h, name, rows) + self.steps[name][rows][..., None] * moved

    def sorted(self, h, name, kinds, rows):
        own, moved = (
            jnp.einsum("nd,ndf->nf", h, tree[name][kinds]) for tree in (self.params, self.direction)
        )
        return own + self.steps[name][rows][:, None] * moved


def capacity(use, x, *, combine="product", groups=None):
    """GShard's and Switch's dispatch: a place in an expert's buffer is a sum over all tokens."""
    h = jnp.tanh(use.dense(x.reshape(-1, F), "in", ROWS))
    gates = jax.nn.softmax(use.dense(h, "router", ROWS))
    chosen = jax.nn.one_hot(jnp.argmax(gates, axis=-1), EXPERTS, dtype=jnp.int32)
    place = jnp.cumsum(chosen, axis=0) * chosen - 1
    kept = (chosen > 0) & (place < CAPACITY)
    dispatch = jax.nn.one_hot(place, CAPACITY) * kept[..., None].astype(jnp.float32)
    if combine == "product":
        weights = jnp.max(gates, axis=-1)[:, None, None] * dispatch
    else:
        weights = jnp.einsum("te,tec->tec", gates, dispatch)
    rows = jnp.einsum("tec,t->ec", dispatch, ROWS.astype(jnp.float32)).astype(jnp.int32)
    sent = jnp.einsum("tec,td->ecd", dispatch, h)
    found = use.by_expert(jax.nn.relu(use.by_expert(sent, "up", rows)), "down", rows)
    out = jnp.einsum("tec,ecd->td", weights, found) + h
    balance = jnp.sum(jnp.mean(gates, axis=0) * jnp.mean(chosen.astype(jnp.float32), axis=0))
    return jnp.mean(jnp.square(use.dense(out, "in", ROWS))) + 0.1 * balance


def sorted_top_two(use, x):
    """Tokens repeated, sorted by expert, multiplied in groups, added up where they came from."""
    h = jnp.tanh(use.dense(x.reshape(-1, F), "in", ROWS))
    gates, kinds = jax.lax.top_k(jax.nn.softmax(use.dense(h, "router", ROWS)), 2)
    order = jnp.argsort(kinds.ravel())
    token = order // 2
    kinds, rows = kinds.ravel()[order], ROWS[token]
    found = jax.nn.relu(use.sorted(h[token], "up", kinds, rows))
    found = use.sorted(found, "down", kinds, rows) * gates.ravel()[order][:, None]
    out = jnp.zeros_like(h).at[token].add(found) + h
    return jnp.mean(jnp.square(use.dense(out.reshape(B, T, F), "in", ROWS.reshape(B, T))))


def copies_of_top_two(use, x):
    """The same, brought home by the inverse order: (copies [N, 2, H], their gates, inputs)."""
    h = jnp.tanh(use.dense(x.reshape(-1, F), "in", ROWS))
    gates, kinds = jax.lax.top_k(jax.nn.softmax(use.dense(h, "router", ROWS)), 2)
    order = jnp.argsort(kinds.ravel())
    rows = jnp.repeat(ROWS, 2)[order]
    found = use.sorted(jnp.repeat(h, 2, axis=0)[order], "up", kinds.ravel()[order], rows)
    return found[jnp.argsort(order)].reshape(-1, 2, H), gates, h


def unsorted_top_two(use, x):
    found, gates, h = copies_of_top_two(use, x)
    return jnp.mean(jnp.square(jnp.sum(found * gates[..., None], axis=1))) + jnp.mean(h)


def combined_by_einsum(use, x):
    found, gates, _ = copies_of_top_two(use, x)
    return jnp.mean(jnp.square(jnp.einsum("bkh,bk->bh", found, gates)))


@jax.custom_vjp
def in_order(h, order):
    return h[order]


in_order.defvjp(lambda h, order: (h[order], order), lambda order, g: (g[jnp.argsort(order)], None))


def padded_to_tiles(use, x):
    """On devices, as in MaxText: sorted by a rule of its own, and products of whole tiles."""

    def local(h, gates, kinds):
        rows = jnp.repeat(ROWS, 2)
        order = jnp.argsort(kinds.ravel())
        kinds, rows = kinds.ravel()[order], rows[order]
        sorted_ = in_order(jnp.repeat(h, 2, axis=0), order)
        for name in ("up", "down"):
            wide = [(0, TILE - len(rows)), *((0, 0),) * (sorted_.ndim - 1)]
            found = use.sorted(
                jnp.pad(sorted_, wide),
                name,
                jnp.pad(kinds, wide[:1], constant_values=EXPERTS),
                jnp.pad(rows, wide[:1]),
            )
            sorted_ = jax.nn.silu(found[: len(rows)])
        found = in_order(sorted_, jnp.argsort(order)).reshape(-1, 2, F)
        return jnp.einsum("nkf,nk->nf", found, gates)

    h = jnp.tanh(use.dense(x.reshape(-1, F), "in", ROWS))
    gates, kinds = jax.lax.top_k(jax.nn.softmax(use.dense(h, "router", ROWS)), 2)
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(local, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
    return jnp.mean(jnp.square(use.dense(run(h, gates, kinds) + h, "in", ROWS)))


def experts_choose(use, x):
    """Every expert takes the tokens that it likes best."""
    h = jnp.tanh(use.dense(x.reshape(-1, F), "in", ROWS))
    scores = jax.nn.softmax(use.dense(h, "router", ROWS))
    gates, tokens = jax.lax.top_k(scores.T, CAPACITY)
    rows = ROWS[tokens]
    found = use.by_expert(jax.nn.relu(use.by_expert(h[tokens], "up", rows)), "down", rows)
    out = h.at[tokens.ravel()].add((found * gates[..., None]).reshape(-1, F))
    return jnp.mean(jnp.square(out))


CASES = {
    "capacity": capacity,
    "capacity_by_einsum": lambda use, x: capacity(use, x, combine="einsum"),
    "capacity_rematerialised_in_a_loop": lambda use, x: jax.lax.scan(
        jax.checkpoint(lambda total, _: (total + capacity(use, x), None)), 0.0, None, length=2
    )[0],
    "sorted_top_two": sorted_top_two,
    "unsorted_top_two": unsorted_top_two,
    "combined_by_einsum": combined_by_einsum,
    "padded_to_tiles": padded_to_tiles,
    "experts_choose": experts_choose,
}


@pytest.mark.quick("experts_choose", "combined_by_einsum")
@pytest.mark.parametrize("name", CASES)
def test_experts(name):
    direction = direction_like(PARAMS)

    def loss_fn(params, x):
        return CASES[name](Shared(params), x)

    def moved(steps, params, x):
        return CASES[name](OfEveryRow(params, direction, steps), x)

    early = value_grad_and_dots(loss_fn, loss_reduction="sum")
    is_on_devices = name == "padded_to_tiles"  # where no factors of moved rows are kept
    late = value_and_dots_fn(loss_fn, loss_reduction="sum", remat=is_on_devices)

    @jax.jit
    def run(params, x, v):
        result = early(params, x, direction=v)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v)
        several = late(params, x)[2].result(stacked)
        expected = jax.grad(moved)({name: jnp.zeros(B) for name in params}, params, x)
        return result, several, expected

    result, several, expected = run(PARAMS, X, direction)
    testing.assert_dots_close(result.dots, expected)
    testing.assert_dots_close(
        several.dots, jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), expected)
    )
    assert (int(result.conflicts), int(several.conflicts)) == (0, 0)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def test_weights_that_do_not_tell_which_are_zero_are_refused():
    """A sum over tokens with weights through which gradient flows: zero is no promise."""

    def loss_fn(params, x):
        h = x.reshape(-1, F)
        weights = jax.nn.softmax(h @ params["router"], axis=0)
        return jnp.mean(jnp.square(jnp.einsum("te,td->ed", weights, h) @ params["in"]))

    with pytest.raises(ValueError, match=r"(reduce_sum|dot_general|div) at .*test_experts"):
        value_grad_and_dots(loss_fn)(PARAMS, X, direction=PARAMS)


def test_weights_that_send_two_rows_to_one_place_have_no_dots():
    def loss_fn(params, x):
        h = jnp.tanh(x.reshape(-1, F) @ params["in"])
        halves = jax.nn.one_hot((h[:, 0] > 0).astype(jnp.int32), 2)
        return jnp.mean(jnp.square(jnp.einsum("te,td->ed", halves, h) @ params["in"]))

    run = jax.jit(lambda p, x: value_grad_and_dots(loss_fn)(p, x, direction=p))
    result = run(PARAMS, X)
    assert int(result.conflicts) > 0
    assert jnp.isnan(result.dots["in"]).all()


def test_sums_over_rows_of_inputs_are_known_to_mix():
    """Numbers that are no mask: an error while tracing."""

    def loss_fn(params, x):
        h = jnp.einsum("td,te->de", jnp.tanh(x.reshape(-1, F) @ params["in"]), x.reshape(-1, F))
        return jnp.mean(h * params["in"])

    with pytest.raises(ValueError, match=r"\['in'\] meets data in mul at .*sums over the row axis"):
        value_grad_and_dots(loss_fn)(PARAMS, X, direction=PARAMS)
