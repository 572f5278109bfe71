"""coupled="share": rows that see each other in the loss have shares of its gradient.

The oracle gives every row parameters of its own for what it computes by itself, and takes the
gradient with respect to these copies. What is computed of all rows at once uses one more copy, of
nobody.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from ghostjax import conservation_error, explain, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import directions_like, draw
from tests.variants import some_quick

B, F = 6, 4
PARAMS = {
    "w": draw(F, F),
    "v": draw(F, F, seed=1),
    "b": draw(F, seed=2),
    "s": jnp.float32(0.3),
}
BATCH = {"x": draw(B, F, seed=3), "y": draw(B, F, seed=4)}
DIAGONAL = np.arange(B)


def clip(use, nobody, batch):
    images = use(lambda p, x: jnp.tanh(x @ p["w"]), batch["x"])
    texts = use(lambda p, y: y @ p["v"] + p["b"][None], batch["y"])
    logits = images @ texts.T * jnp.exp(nobody["s"])
    both = jax.nn.log_softmax(logits, 0) + jax.nn.log_softmax(logits, 1)
    return -jnp.mean(both[DIAGONAL, DIAGONAL]) / 2


def sigmoid_pairs(use, nobody, batch):
    """SigLIP, with a bias for all pairs."""
    images = use(lambda p, x: jnp.tanh(x @ p["w"]), batch["x"])
    texts = use(lambda p, y: y @ p["v"], batch["y"])
    logits = jnp.einsum("if,jf->ij", images, texts) * jnp.exp(nobody["s"]) + nobody["b"][0]
    return -jnp.sum(jax.nn.log_sigmoid(logits * (2 * jnp.eye(B) - 1))) / B


def simclr(use, nobody, batch):
    def views(p, x, y):
        return jnp.stack([jnp.tanh(v @ p["w"]) @ p["v"] for v in (x, y)], 1)

    z = use(views, batch["x"], batch["y"])
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.mean(optax.losses.ntxent(z.reshape(2 * B, F), np.repeat(DIAGONAL, 2), 0.5))


def vicreg(use, nobody, batch):
    one, two = (
        use(lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"], batch[name]) for name in "xy"
    )

    def regular(z):
        z = z - jnp.mean(z, 0, keepdims=True)
        deviation = jnp.sqrt(jnp.var(z, 0) + 1e-4)
        covariance = z.T @ z / (B - 1)
        off = jnp.sum(jnp.square(covariance)) - jnp.sum(jnp.square(jnp.diagonal(covariance)))
        return jnp.mean(jax.nn.relu(1 - deviation)) + off / F

    return jnp.mean(jnp.square(one - two)) + regular(one) + regular(two)


def barlow_twins(use, nobody, batch):
    one, two = (use(lambda p, x: jnp.tanh(x @ p["w"]), batch[name]) for name in "xy")
    one, two = ((z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True) for z in (one, two))
    return jnp.sum(jnp.square(jnp.einsum("bi,bj->ij", one, two) / B - jnp.eye(F)))


def ppo(use, nobody, batch):
    """Advantages by a baseline that is learned with them, normalised over the batch."""
    values = use(lambda p, x: jnp.tanh(x @ p["w"]) @ p["b"], batch["x"])
    advantages = batch["y"][:, 0] - values
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = use(
        lambda p, x, a: jnp.exp(jnp.tanh(x @ p["v"])[:, 0] - a), batch["x"], batch["y"][:, 1]
    )
    clipped = jnp.clip(ratio, 0.8, 1.2)
    return jnp.mean(-jnp.minimum(ratio * advantages, clipped * advantages)) + nobody["s"] ** 2


def attention_over_rows(use, nobody, batch):
    h = use(lambda p, x: jnp.tanh(x @ p["w"]), batch["x"])
    mixed = jax.nn.softmax(h @ h.T) @ h  # no row is left
    return jnp.mean(jnp.square(mixed @ nobody["v"]))


def statistics_in_a_row(use, nobody, batch):
    """What has a row axis keeps it, whatever all rows decide."""
    h = use(lambda p, x: jnp.tanh(x @ p["w"]), batch["x"])
    whitened = (h - h.mean(0, keepdims=True)) @ jnp.linalg.inv(h.T @ h + jnp.eye(F))
    return jnp.mean(use(lambda p, h: jnp.sum(jnp.sin(h @ p["v"] + p["b"][None]), -1), whitened))


def mixed_up(use, nobody, batch):
    """Manifold mixup: a place of the mixture is of the row that was there."""
    h = use(lambda p, x: jnp.tanh(x @ p["w"]), batch["x"])
    h = 0.7 * h + 0.3 * h[jnp.argsort(batch["y"][:, 0])]
    return jnp.mean(use(lambda p, h: jnp.sum(jnp.sin(h @ p["v"]), -1), h))


def normalized(h, scale, bias):
    return (h - h.mean(0, keepdims=True)) * jax.lax.rsqrt(h.var(0) + 1e-5)[None] * scale + bias


def layers(use, nobody, batch, *, remat=lambda f: f):
    """BatchNorm by hand: three layers."""

    def layer(h, _):
        h = use(lambda p, h: h @ p["w"], h)
        h = normalized(h, 1.0, 0.0)
        return jnp.tanh(use(lambda p, h: h * p["s"] + p["b"][None], h)), None

    h, _ = jax.lax.scan(remat(layer), batch["x"], None, length=3)
    return jnp.mean(jnp.square(use(lambda p, h, y: h @ p["v"] - y, h, batch["y"])))


def rematerialised(use, nobody, batch):
    return layers(use, nobody, batch, remat=jax.checkpoint)


def batch_norm(p, batch):
    """The same as one layer, by Flax."""
    model = nn.BatchNorm(use_running_average=False)
    variables = {
        "batch_stats": {"mean": jnp.zeros(F), "var": jnp.ones(F)},
        "params": {"scale": jnp.broadcast_to(p["s"], (F,)), "bias": p["b"]},
    }
    h, _ = model.apply(variables, batch["x"] @ p["w"], mutable=["batch_stats"])
    return jnp.mean(jnp.square(jnp.tanh(h) @ p["v"] - batch["y"]))


def batch_norm_nnx(p, batch):
    model = nnx.BatchNorm(F, use_running_average=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    state["scale"].set_value(jnp.broadcast_to(p["s"], (F,)))
    state["bias"].set_value(p["b"])
    model = nnx.merge(graph, state)
    h = jnp.tanh(model(batch["x"] @ p["w"]))
    return jnp.mean(jnp.square(h @ p["v"] - batch["y"]))


def by_hand(use, nobody, batch):
    return one_layer(use, None, batch)


def by_flax(use, nobody, batch):
    """Flax multiplies the scale with the deviation, which is of no row."""
    return one_layer(use, nobody["s"], batch)


def one_layer(use, scale, batch):
    h = use(lambda p, x: x @ p["w"], batch["x"])
    h = normalized(h, 1.0 if scale is None else scale, 0.0)

    def rest(p, h):
        h = h * p["s"] if scale is None else h
        return jnp.tanh(h + p["b"][None]) @ p["v"]

    return jnp.mean(jnp.square(use(rest, h) - batch["y"]))


def plainly(loss):
    return lambda p, batch: loss(lambda function, *data: function(p, *data), p, batch)


def over_devices(p, batch):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.shard_map(
        mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec()
    )
    def loss(p, batch):
        h = batch["x"] @ p["w"]
        mean = jax.lax.pmean(h.mean(0, keepdims=True), "d")
        square = jax.lax.pmean(jnp.square(h).mean(0, keepdims=True), "d")
        h = (h - mean) * jax.lax.rsqrt(square - jnp.square(mean) + 1e-5)
        out = jnp.tanh(h * p["s"] + p["b"][None]) @ p["v"]
        return jax.lax.pmean(jnp.mean(jnp.square(out - batch["y"])), "d")

    return loss(p, batch)


def worst_groups(use, nobody, batch):
    """Group DRO: losses are added up by group, and of these the largest weigh most."""
    losses = use(lambda p, x: jnp.sum(jnp.square(jnp.tanh(x @ p["w"]) @ p["v"]), 1), batch["x"])
    groups = (
        jnp.argsort(jnp.argsort(batch["y"][:, 0])) // 2
    )  # alone in its group, a row has all of it
    return jax.nn.logsumexp(jax.ops.segment_sum(losses, groups, 3) * jnp.exp(nobody["s"]))


def means_of_groups(use, nobody, batch):
    """What is computed of a group belongs to nobody; known groups."""
    groups = DIAGONAL % 3
    h = use(lambda p, x: jnp.tanh(x @ p["w"]), batch["x"])
    means = jax.ops.segment_sum(h, groups, 3) @ nobody["v"]
    return jnp.mean(jnp.square(means[groups] + use(lambda p, y: y @ p["v"], batch["y"])))


BY_USE = [
    clip,
    sigmoid_pairs,
    simclr,
    vicreg,
    barlow_twins,
    ppo,
    attention_over_rows,
    statistics_in_a_row,
    mixed_up,
    layers,
    rematerialised,
    worst_groups,
    means_of_groups,
]
COUNTED = ["mixed_up", "worst_groups", "means_of_groups"]
CASES = {loss.__name__: (plainly(loss), loss) for loss in BY_USE} | {
    "batch_norm": (batch_norm, by_flax),
    "batch_norm_nnx": (batch_norm_nnx, by_flax),
    "statistics_over_devices": (over_devices, by_hand),
}


def shares(loss, directions):
    """By parameter, [K, B], and the part of nobody, [K]."""

    def of(copies, nobody):
        def use(function, *data):
            def one(p, *row):
                return function(p, *(leaf[None] for leaf in row))[0]

            return jax.vmap(one)(copies, *data)

        return loss(use, nobody, BATCH)

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape)), PARAMS)
    own, rest = jax.jit(jax.grad(of, argnums=(0, 1)))(copies, PARAMS)

    def pair(gradient, vectors, rows):
        flat = np.asarray(vectors, np.float64).reshape(len(vectors), -1)
        return flat @ np.asarray(gradient, np.float64).reshape(*rows, -1).T

    return (
        jax.tree.map(lambda g, v: pair(g, v, (B,)), own, directions),
        jax.tree.map(lambda g, v: pair(g, v, ()), rest, directions),
    )


# Like others, which are quick.
SLOW = {
    "sigmoid_pairs", "vicreg", "barlow_twins", "rematerialised", "means_of_groups", "batch_norm_nnx"
}  # fmt: skip


@pytest.mark.quick(
    "batch_norm-mean", "attention_over_rows-mean", "statistics_in_a_row-mean", "mixed_up-mean"
)
@pytest.mark.parametrize(
    ("name", "reduction"),
    some_quick(
        [*((name, "mean") for name in CASES), ("clip", "sum")],
        lambda variant: variant[0] not in SLOW and variant != ("clip", "sum"),
    ),
)
def test_shares_of_coupled_rows(name, reduction):
    loss_fn, loss = CASES[name]
    directions = directions_like(PARAMS)
    first = jax.tree.map(lambda leaf: leaf[0], directions)
    options = {"coupled": "share", "loss_reduction": reduction}
    late = value_and_dots_fn(loss_fn, **options)

    @jax.jit
    def run(params, batch, first, directions):
        early = value_grad_and_dots(loss_fn, **options)(params, batch, direction=first)
        return early, late(params, batch)[2].result(directions)

    early, several = run(PARAMS, BATCH, first, directions)
    scale = B if reduction == "mean" else 1
    own, rest = shares(loss, directions)
    own = jax.tree.map(lambda leaf: leaf * scale, own)
    testing.assert_dots_close(several.dots, own)
    testing.assert_dots_close(early.dots, jax.tree.map(lambda leaf: leaf[0], own))
    testing.assert_dots_close((several.dots, several.shared), (own, rest))
    assert int(early.conflicts) == 0
    value, grads = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, BATCH)
    testing.assert_dots_close((early.value, early.grads), (value, grads), rtol=1e-6)
    for result, vectors in ((early, first), (several, directions)):
        errors = conservation_error(result, vectors)
        assert max(np.max(leaf) for leaf in jax.tree.leaves(errors)) <= 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if name not in COUNTED])
def test_without_it_the_error_names_it(name):
    with pytest.raises(ValueError, match='coupled="share"'):
        jax.eval_shape(value_grad_and_dots(CASES[name][0]), PARAMS, BATCH, direction=PARAMS)


@pytest.mark.parametrize("name", COUNTED)
def test_places_that_are_coupled_when_the_program_runs_are_counted_without_it(name):
    fn = value_grad_and_dots(CASES[name][0])
    result = jax.jit(lambda p, batch: fn(p, batch, direction=p))(PARAMS, BATCH)
    assert int(result.conflicts) > 0
    assert bool(jnp.isnan(result.dots["v"]).all())


def test_labels_add_shares_up():
    loss_fn, loss = CASES["clip"]
    ids = jnp.array([0, 1, 1, -1, 0, 2])
    directions = directions_like(PARAMS)
    options = {"coupled": "share", "loss_reduction": "sum"}
    late = value_and_dots_fn(loss_fn, **options)

    @jax.jit
    def run(params, batch, directions):
        return late(params, batch, labels=ids, num_labels=3)[2].result(directions)

    result = run(PARAMS, BATCH, directions)
    own, _ = shares(loss, directions)
    testing.assert_dots_close(
        result.dots,
        jax.tree.map(
            lambda leaf: np.stack([leaf[:, ids == k].sum(1) for k in range(3)], axis=1), own
        ),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupled": "sum"}, 'coupled must be "error" or "share", got \'sum\''),
        ({"coupled": "share", "norms": True}, "no norms of gradients .*Call with norms=False"),
    ],
    ids=["another_name", "norms"],
)
def test_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(CASES["clip"][0], **options)


def test_explain_shows_what_is_of_nobody():
    explanation = explain(CASES["clip"][0], coupled="share")(PARAMS, BATCH)
    assert {use.parameter: use.in_rows for use in explanation.uses} == {
        "['w']": True,
        "['v']": True,
        "['b']": True,
        "['s']": False,
    }
    assert explanation.norms.refused.startswith("coupled rows have shares of the loss")
    assert explanation.norms_cost is explanation.clipped_cost is None
    assert "squared_norms           refused: coupled rows have shares" in str(explanation)
