"""Rows that go to other devices inside of ``jax.shard_map``, as to experts that lie there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import direction_like, draw
from tests.dots.checks import expected_dots

B, T, D, F, EXPERTS = 8, 3, 5, 6, 8
MESH = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
AHEAD, BACK = [(k, (k + 1) % 4) for k in range(4)], [((k + 1) % 4, k) for k in range(4)]
PARAMS = {
    "in": draw(D, D, seed=1),
    "router": draw(D, EXPERTS, seed=2),
    "w": draw(EXPERTS, D, F, seed=3),
    "v": draw(EXPERTS, F, D, seed=4),
}
SPECS = {"in": P(), "router": P(), "w": P("data"), "v": P("data")}
X = draw(B, T, D, seed=5)


def experts(p, x):  # [experts, places, D]
    h = jnp.tanh(jnp.einsum("ecd,edf->ecf", x, p["w"]))
    return jnp.einsum("ecf,efd->ecd", h, p["v"])


def sent(p, x):
    x = jax.lax.all_to_all(x, "data", 0, 1, tiled=True)
    return jax.lax.all_to_all(experts(p, x), "data", 1, 0, tiled=True)


def sent_untiled(p, x):
    parts = jax.lax.all_to_all(x.reshape(4, EXPERTS // 4, *x.shape[1:]), "data", 0, 0)
    y = experts(p, jnp.swapaxes(parts, 0, 1).reshape(EXPERTS // 4, -1, D))
    y = jnp.swapaxes(y.reshape(EXPERTS // 4, 4, -1, D), 0, 1)
    return jax.lax.all_to_all(y, "data", 0, 0).reshape(x.shape)


def gathered(p, x):
    every = jax.lax.all_gather(x, "data", axis=1, tiled=True)
    first = jax.lax.axis_index("data") * (EXPERTS // 4)
    y = experts(p, jax.lax.dynamic_slice_in_dim(every, first, EXPERTS // 4, 0))
    y = jnp.zeros_like(every).at[first + jnp.arange(EXPERTS // 4)].set(y)
    return jax.lax.psum_scatter(y, "data", scatter_dimension=1, tiled=True)


def layer(p, x, exchange):
    """Every token goes to one expert, as far as its place there reaches."""
    h = jnp.tanh(x @ p["in"])
    tokens = h.reshape(-1, D)
    gates = jax.nn.softmax(tokens @ p["router"])
    expert = jnp.argmax(gates, -1)
    chosen = jax.nn.one_hot(expert, EXPERTS, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, -1)
    dispatch = jax.nn.one_hot(place, len(tokens))[:, None, :] * jnp.float32(chosen)[:, :, None]
    y = exchange(p, jnp.einsum("nd,nec->ecd", tokens, dispatch))
    y = jnp.einsum("ecd,nec->nd", y, dispatch) * jnp.max(gates, -1, keepdims=True)
    return jnp.sum(jnp.square(y.reshape(x.shape) + h), axis=2)  # [B, T]


def ring(p, x):
    h = jax.lax.ppermute(jnp.tanh(x @ p["in"]), "data", AHEAD)
    h = jax.lax.ppermute(jnp.tanh(h @ p["in"]), "data", BACK)
    return jnp.sum(jnp.square(h + x), axis=2)


def sent_in_groups(p, x):
    """Gathered from all devices, and added up in groups of two of them."""
    h = jax.lax.all_gather(jnp.tanh(x @ p["in"]), "data", axis=0, tiled=True)
    h = jnp.tanh(h @ p["in"]) / 2
    groups = [[2, 1], [0, 3]]
    h = jax.lax.psum_scatter(h, "data", scatter_dimension=0, axis_index_groups=groups, tiled=True)
    return jnp.sum(jnp.square(jnp.tanh(h @ p["in"])), axis=2)


def alone_in_groups(p, x):
    return jnp.sum(
        jnp.square(jnp.tanh(jnp.tanh(jnp.tanh(x @ p["in"]) @ p["in"]) @ p["in"])), axis=2
    )


def alone(p, x):
    return jnp.sum(jnp.square(jnp.tanh(jnp.tanh(x @ p["in"]) @ p["in"]) + x), axis=2)


def with_experts(exchange):
    return (lambda p, x: layer(p, x, exchange)), (lambda p, x: layer(p, x, experts))


CASES = {
    "all_to_all": with_experts(sent),
    "untiled": with_experts(sent_untiled),
    "gathered": with_experts(gathered),
    "ring": (ring, alone),
}


def loss_of(local, *, reduced, check_vma, remat=False):
    def inside(p, x):
        losses = jnp.mean(local(p, x), axis=1)
        return jax.lax.pmean(jnp.mean(losses), "data") if reduced else losses

    run = jax.shard_map(
        jax.checkpoint(inside) if remat else inside,
        mesh=MESH,
        in_specs=(SPECS, P("data")),
        out_specs=P() if reduced else P("data"),
        check_vma=check_vma,
    )
    return lambda p, x: jnp.mean(run(p, x))


@pytest.mark.quick("gathered-False", "ring-True")
@pytest.mark.parametrize(("name", "check_vma"), [*itertools.product(CASES, [False, True])])
def test_rows_that_go_to_other_devices_and_come_back(name, check_vma):
    local, apart = CASES[name]
    loss_fn = loss_of(local, reduced=check_vma, check_vma=check_vma, remat=not check_vma)
    direction = direction_like(PARAMS)
    fn = value_grad_and_dots(loss_fn)
    result = jax.jit(lambda p, x: fn(p, x, direction=direction))(PARAMS, X)
    expected = expected_dots(lambda p, x: jnp.mean(apart(p, x), axis=1), PARAMS, X, direction)
    testing.assert_dots_close(result.dots, expected)
    assert int(result.conflicts) == 0
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


@pytest.mark.parametrize("check_vma", [False, True])
def test_groups_of_devices(check_vma):
    loss_fn = loss_of(sent_in_groups, reduced=True, check_vma=check_vma)
    direction = direction_like(PARAMS)
    result = jax.jit(lambda p, x: value_grad_and_dots(loss_fn)(p, x, direction=direction))(
        PARAMS, X
    )
    expected = expected_dots(
        lambda p, x: jnp.mean(alone_in_groups(p, x), axis=1), PARAMS, X, direction
    )
    testing.assert_dots_close(result.dots, expected)


@pytest.mark.parametrize("check_vma", [False, True])
def test_one_row_on_every_device(check_vma):
    """Its loss is a number there, and that of all devices a sum as any other."""
    loss_fn = loss_of(ring, reduced=True, check_vma=check_vma)
    direction, few = direction_like(PARAMS), X[:4]
    result = jax.jit(lambda p, x: value_grad_and_dots(loss_fn)(p, x, direction=direction))(
        PARAMS, few
    )
    expected = expected_dots(lambda p, x: jnp.mean(alone(p, x), axis=1), PARAMS, few, direction)
    testing.assert_dots_close(result.dots, expected)
    assert int(result.conflicts) == 0


def test_late_directions_and_labels():
    loss_fn = loss_of(CASES["all_to_all"][0], reduced=False, check_vma=True)
    direction, labels = direction_like(PARAMS), jnp.arange(B * T).reshape(B, T) % 5 - 1

    def summed(p, x):
        return loss_fn(p, x) * (B * T)

    @jax.jit
    def run(p, x):
        late = value_and_dots_fn(loss_fn, remat=True)(p, x)[2](direction)
        fn = value_grad_and_dots(summed, loss_reduction="sum")
        return late, fn(p, x, direction=direction, labels=labels, num_labels=4).dots

    late, of_labels = run(PARAMS, X)
    places = expected_dots(
        lambda p, x: layer(p, x, experts)[:, 0], PARAMS, X.reshape(B * T, 1, D), direction
    )
    testing.assert_dots_close(late, jax.tree.map(lambda d: d.reshape(B, T).mean(1), places))
    expected = jax.tree.map(
        lambda d: np.stack([d[labels.ravel() == k].sum() for k in range(4)]), places
    )
    testing.assert_dots_close(of_labels, expected)
    with pytest.raises(NotImplementedError, match="remat=True"):
        value_and_dots_fn(loss_fn)(PARAMS, X)


def test_rows_that_do_not_come_back_are_a_conflict_or_an_error():
    def away(p, x):
        h = jax.lax.ppermute(jnp.tanh(x @ p["in"]), "data", AHEAD)
        return jnp.sum(jnp.square(h @ p["in"]), axis=2)

    loss_fn = loss_of(away, reduced=False, check_vma=True)
    fn = jax.jit(lambda p, x: value_grad_and_dots(loss_fn)(p, x, direction=p))
    result = fn(PARAMS, X)
    assert int(result.conflicts) > 0
    assert bool(jnp.isnan(result.dots["in"]).all())
    # Added up at once, every row has its dots wherever it is.
    loss_fn = loss_of(away, reduced=True, check_vma=True)
    result = jax.jit(lambda p, x: value_grad_and_dots(loss_fn)(p, x, direction=p))(PARAMS, X)
    apart = expected_dots(
        lambda p, x: jnp.mean(jnp.sum(jnp.square(jnp.tanh(x @ p["in"]) @ p["in"]), axis=2), axis=1),
        PARAMS,
        X,
        PARAMS,
    )
    testing.assert_dots_close(result.dots["in"], apart["in"])

    def added(p, x):
        h = jax.lax.psum(jax.lax.ppermute(x @ p["in"], "data", AHEAD), "data")
        return jnp.sum(jnp.square(h @ p["in"]), axis=2)

    loss_fn = loss_of(added, reduced=True, check_vma=True)
    result = jax.jit(lambda p, x: value_grad_and_dots(loss_fn)(p, x, direction=p))(PARAMS, X)
    assert int(result.conflicts) > 0


def rowwise_loss(rule):
    """A fused loss; ``rule`` does something to the gradient of its parameter."""

    @jax.custom_vjp
    def fused(h, w):
        return jnp.sum(jnp.square(h @ w))

    def backward(kept, c):
        h, w = kept
        d = 2 * (h @ w) * c
        return d @ w.T, rule(jnp.einsum("btd,bte->de", h, d))

    fused.defvjp(lambda h, w: (fused(h, w), (h, w)), backward)

    def inside(p, x):
        h = jax.lax.ppermute(jnp.tanh(x @ p["in"]), "data", AHEAD)
        w = p["in"] if rule is over_devices else jax.lax.pcast(p["in"], "data", to="varying")
        return jax.lax.psum(fused(h, w), "data") / (4 * T)

    run = jax.shard_map(inside, mesh=MESH, in_specs=(SPECS, P("data")), out_specs=P())
    return lambda p, x: run(p, x)


def over_devices(gradient):
    return jax.lax.psum(gradient, "data")


def test_a_rule_that_adds_up_over_devices_of_one_row_each():
    """Its dots were those of all rows, without a word; the way out that the error names works."""
    few, direction = X[:4], direction_like(PARAMS)
    with pytest.raises(ValueError, match=r"which have one row each.*jax\.lax\.pcast"):
        jax.eval_shape(
            value_grad_and_dots(rowwise_loss(over_devices)), PARAMS, few, direction=direction
        )
    fn = value_grad_and_dots(rowwise_loss(lambda gradient: gradient))
    result = jax.jit(lambda p, x: fn(p, x, direction=direction))(PARAMS, few)
    expected = expected_dots(
        lambda p, x: jnp.mean(jnp.sum(jnp.square(jnp.tanh(x @ p["in"]) @ p["in"]), 2), 1),
        PARAMS,
        few,
        direction,
    )
    testing.assert_dots_close(result.dots, expected)


def test_a_rule_that_adds_up_over_devices_keeps_no_factors():
    @jax.custom_vjp
    def total(h, w):
        return jnp.sum(jnp.sin(h @ w))

    def rule(kept, c):
        h, w = kept
        d = jnp.cos(h @ w) * c
        return d @ w.T, jax.lax.psum(jnp.einsum("btf,btg->fg", h, d), "data")

    total.defvjp(lambda h, w: (total(h, w), (h, w)), rule)
    loss_fn = jax.shard_map(
        lambda p, x: jax.lax.psum(total(jnp.tanh(x @ p["in"]), p["in"]), "data") / B,
        mesh=MESH,
        in_specs=(SPECS, P("data")),
        out_specs=P(),
    )
    with pytest.raises(NotImplementedError, match=r"a backward rule adds up(.|\n)*remat=True"):
        value_and_dots_fn(loss_fn)(PARAMS, X)
    direction = direction_like(PARAMS)
    late = jax.jit(lambda p, x: value_and_dots_fn(loss_fn, remat=True)(p, x)[2](direction))
    expected = expected_dots(
        lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p["in"]) @ p["in"]), (1, 2)),
        PARAMS,
        X,
        direction,
    )
    testing.assert_dots_close(late(PARAMS, X), expected)
