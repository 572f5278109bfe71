"""Dots of examples that are not rows: packed documents, single positions, groups of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import direction_like, directions_like, draw
from tests.dots import packed
from tests.dots.checks import expected_dots
from tests.dots.packed import DOCUMENTS, B, T

PARAMS, BATCH = packed.parameters(), packed.packed_batch()
DIRECTION = direction_like(PARAMS)
PLACES = jnp.arange(B * T).reshape(B, T)


def dots_of(gradients, direction):
    return jax.tree.map(
        lambda *leaves: np.stack(
            [np.vdot(np.asarray(leaf, np.float64), leaves[-1]) for leaf in leaves[:-1]]
        ),
        *gradients,
        direction,
    )


@pytest.fixture(scope="module")
def of_documents_apart():
    """By document, of its own loss."""
    loss = functools.partial(packed.token_losses, scan=False, remat=False)
    grad = jax.jit(jax.grad(lambda params, batch: jnp.sum(loss(params, batch))))
    return [grad(PARAMS, own) for own in packed.documents_apart(BATCH)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"scan": False, "remat": False, "flat": True}],
    ids=["scan_and_remat", "flat"],
)
def test_packed_documents_have_the_dots_of_documents_apart(options, of_documents_apart):
    def loss_fn(params, batch):
        return jnp.sum(packed.token_losses(params, batch, **options))

    early = value_grad_and_dots(loss_fn, loss_reduction="sum")
    late = value_and_dots_fn(loss_fn, loss_reduction="sum")

    @jax.jit
    def run(params, batch, direction, directions):
        given = {"labels": batch["documents"], "num_labels": DOCUMENTS}
        result = early(params, batch, direction=direction, **given)
        by_position = early(params, batch, direction=direction, labels=PLACES, num_labels=B * T)
        rows = early(params, batch, direction=direction)
        return result, late(params, batch, **given)[2].result(directions), by_position, rows

    directions = directions_like(PARAMS)
    result, several, by_position, rows = run(PARAMS, BATCH, DIRECTION, directions)
    testing.assert_dots_close(result.dots, dots_of(of_documents_apart, DIRECTION))
    for k in range(3):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], directions)
        found = jax.tree.map(lambda leaf, k=k: leaf[k], several.dots)
        testing.assert_dots_close(found, dots_of(of_documents_apart, own))
    assert max(jax.tree.leaves(conservation_error(result, DIRECTION))) <= 1e-5
    assert int(result.conflicts) == 0
    summed = jax.tree.map(lambda leaf: leaf.reshape(B, T).sum(1), by_position.dots)
    testing.assert_dots_close(summed, rows.dots)


def test_labels_in_bfloat16_are_as_exact_as_rows():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)

    def loss_fn(params, batch):
        return jnp.sum(packed.token_losses(params, batch)).astype(jnp.float32)

    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")

    @jax.jit
    def run(params, batch):
        rows = fn(params, batch, direction=params)
        return rows, fn(params, batch, direction=params, labels=PLACES, num_labels=B * T)

    rows, places = run(params, BATCH)
    summed = jax.tree.map(lambda leaf: leaf.reshape(B, T).sum(1), places.dots)
    testing.assert_dots_close(summed, rows.dots)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(places.dots))


# Losses [B, T] of x [B, T, F]; ``use(h, name, places)`` is h times a parameter at every place.
F, WIDTH = 4, 3
P = {"w": draw(F, F), "u": draw(F, F, seed=2), "b": draw(F, F, seed=3)}
X = draw(2, 6, F, seed=1)


def recurrent(use, x, places):
    def cell(state, each):
        x, places = each
        state = jnp.tanh(use(x, "w", places) + use(state, "u", places))
        return state, jnp.sum(jnp.square(use(state, "b", places)), axis=-1)

    xs = (jnp.swapaxes(x, 0, 1), places.T)
    return jax.lax.scan(cell, jnp.zeros_like(x[:, 0]), xs)[1].T


def convolved(use, x, places):
    h = jax.lax.conv_general_dilated(
        jnp.pad(use(x, "w", places), ((0, 0), (WIDTH - 1, 0), (0, 0))),
        draw(WIDTH, 1, F, seed=4),
        (1,),
        "VALID",
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=F,
    )
    return jnp.sum(jnp.square(use(h, "u", places)), axis=-1)


def shifted(use, x, places):
    def before(h):
        return jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    h = jnp.tanh(use(x - 0.5 * before(x), "w", places))
    return jnp.sum(jnp.square(use(h - before(h), "u", places)), axis=-1)


def summed_so_far(use, x, places):
    h = jax.lax.associative_scan(jnp.maximum, jnp.cumsum(use(x, "w", places), axis=1), axis=1)
    return jnp.sum(jnp.square(use(h, "u", places)), axis=-1)


def sorted_by_data(use, x, places):
    flat = x.reshape(-1, F)
    order = jnp.argsort(flat[:, 0])
    h = jnp.tanh(use(flat[order], "w", places.ravel()[order]))[jnp.argsort(order)]
    return jnp.sum(jnp.square(use(h.reshape(x.shape), "u", places) + x), axis=-1)


def in_chunks(use, x, places):
    def body(each):
        x, places = each
        return jnp.sum(jnp.square(use(jnp.tanh(use(x, "w", places)), "u", places)), axis=-1)

    chunks = [jnp.swapaxes(array.reshape(2, 3, 2, *array.shape[2:]), 0, 1) for array in (x, places)]
    return jnp.swapaxes(jax.lax.map(jax.checkpoint(body), tuple(chunks)), 0, 1).reshape(2, 6)


def attending(use, x, places):
    keys, values = use(x, "w", places), use(x, "u", places)
    weights = jax.nn.softmax(jnp.einsum("btf,bsf->bts", x, keys), axis=-1)
    return jnp.sum(jnp.square(use(jnp.einsum("bts,bsf->btf", weights, values), "b", places)), -1)


def backwards(use, x, places):
    def cell(state, each):
        x, places = each
        state = jnp.tanh(use(x, "w", places) + use(state, "u", places))
        return state, state

    xs = (jnp.flip(jnp.swapaxes(x, 0, 1), 0), jnp.flip(places.T, 0))
    h = jnp.flip(jax.lax.scan(cell, jnp.zeros_like(x[:, 0]), xs)[1], 0)
    return jnp.sum(jnp.square(use(jnp.swapaxes(h, 0, 1) + x, "b", places)), axis=-1)


def ordered_by_one_position(use, x, places):
    """What rows are sorted by, and scaled with, is at a position of its own."""
    order = jnp.argsort(x[:, 0, 0])
    xs = (jnp.flip(jnp.swapaxes(x, 0, 1), 0), jnp.flip(places.T, 0))
    h = jax.lax.scan(lambda _, each: (None, jnp.tanh(use(each[0], "w", each[1]))), None, xs)[1]
    h = jnp.swapaxes(jnp.flip(h, 0), 0, 1)[order]
    h = use(h * x[order][:, :1], "u", places[order])
    return jnp.sum(jnp.square(h), axis=-1)[jnp.argsort(order)]


@pytest.mark.quick(
    "convolved", "shifted", "summed_so_far", "sorted_by_data", "attending", "backwards"
)
@pytest.mark.parametrize(
    "losses",
    [
        ordered_by_one_position,
        recurrent,
        convolved,
        shifted,
        summed_so_far,
        sorted_by_data,
        in_chunks,
        attending,
        backwards,
    ],
)
def test_uses_of_parameters_by_position(losses):
    """Against parameters of their own at every place, which move one by one."""
    direction, places = direction_like(P), jnp.arange(12).reshape(2, 6)

    def loss_fn(p, x):
        return jnp.sum(losses(lambda h, name, places: h @ p[name], x, places))

    def moved(steps):
        def use(h, name, places):
            return h @ P[name] + steps[name][places][..., None] * (h @ direction[name])

        return jnp.sum(losses(use, X, places))

    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")

    @jax.jit
    def run(p, x, v):
        result = fn(p, x, direction=v, labels=places, num_labels=12)
        return result, jax.grad(moved)({name: jnp.zeros(12) for name in p})

    result, expected = run(P, X, direction)
    testing.assert_dots_close(result.dots, expected)
    assert int(result.conflicts) == 0


def row_losses(p, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) @ p["u"] @ p["b"]), axis=(-2, -1))


@pytest.mark.slow
@pytest.mark.parametrize("per_example", [False, True])
def test_groups_of_rows_and_padding(per_example):
    """One label per row; what has a negative one belongs to nobody, as ``shared`` says."""
    x, direction = draw(5, 3, F, seed=1), direction_like(P)
    labels = jnp.array([2, 0, -1, 2, -7])

    def loss_fn(p, x):
        return row_losses(p, x[None])[0] if per_example else jnp.mean(row_losses(p, x))

    early = value_grad_and_dots(loss_fn, per_example=per_example)
    late = value_and_dots_fn(loss_fn, per_example=per_example)

    @jax.jit
    def run(p, x, v, labels):
        found = early(p, x, direction=v, labels=labels, num_labels=4)
        dots = late(p, x, labels=labels, num_labels=4)[2]
        return found, dots.result(jax.tree.map(lambda leaf: leaf[None], v))

    result, several = run(P, x, direction, labels)
    rows = expected_dots(row_losses, P, x, direction)
    expected = jax.tree.map(lambda r: np.array([r[1], 0, r[0] + r[3], 0]), rows)
    nobody = jax.tree.map(lambda r: (r[2] + r[4]) / 5, rows)
    testing.assert_dots_close(result.dots, expected)
    testing.assert_dots_close(jax.tree.map(lambda leaf: leaf[0], several.dots), expected)
    testing.assert_dots_close(result.shared, nobody)
    for found, vectors in (
        (result, direction),
        (several, jax.tree.map(lambda leaf: leaf[None], direction)),
    ):
        errors = jax.tree.leaves(conservation_error(found, vectors))
        assert max(float(jnp.max(leaf)) for leaf in errors) <= 1e-5


def test_labels_out_of_range_have_no_dots():
    def run(labels):
        fn = value_grad_and_dots(lambda p, x: jnp.mean(row_losses(p, x)))
        return fn(P, X, direction=P, labels=labels, num_labels=2)

    result = jax.jit(run)(jnp.array([0, 2]))
    assert int(result.conflicts) == 1
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(result.dots))
    with pytest.raises(ValueError, match=r"less than num_labels = 2\. Found 2"):
        run(jnp.array([0, 2]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": jnp.zeros(2, int)}, "labels and num_labels go together"),
        ({"num_labels": 2}, r"Found labels none, num_labels=2"),
        ({"labels": jnp.zeros(3, int), "num_labels": 2}, r"B = 2 rows\. Found int32\[3\]"),
        ({"labels": jnp.zeros(2), "num_labels": 2}, r"must be integers .* Found float32\[2\]"),
        (
            {"labels": jnp.zeros((2, 5), int), "num_labels": 2},
            r"\['w'\] meets data in dot_general ",
        ),
    ],
)
def test_labels_that_do_not_fit(given, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(row_losses(p, x)))
    with pytest.raises(ValueError, match=message):
        fn(P, X, direction=P, **given)


def test_uses_without_a_position():
    def loss_fn(p, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["w"]).mean(-2) @ p["u"]))

    labels = {"labels": jnp.zeros((2, 6), int), "num_labels": 1}
    message = r"\['u'\] meets data in dot_general at .*no axis of positions(.|\n)*one label per row"
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(loss_fn)(P, X, direction=P, **labels)
    with pytest.raises(ValueError, match=r"labels .B, T. tell positions apart(.|\n)*per_example"):
        value_grad_and_dots(loss_fn, per_example=True)(P, X, direction=P, **labels)


def test_parameters_among_positions():
    """A token of parameters before the others: no label says whose it is."""

    def loss_fn(p, x):
        first = jnp.broadcast_to(p["b"][:1], (x.shape[0], 1, F))
        return jnp.mean(jnp.square(jnp.concatenate([first, x], axis=1) @ p["w"]))

    labels = {"labels": jnp.zeros((2, 6), int), "num_labels": 1}
    with pytest.raises(
        ValueError, match=r"\['b'\] meets data in concatenate .*no axis of positions"
    ):
        value_grad_and_dots(loss_fn)(P, X, direction=P, **labels)


def test_parameters_that_are_compared_with_positions():
    """Nothing flows back, but the parameter's other uses have their labels."""

    def loss_fn(p, x):
        return jnp.sum(jnp.where(x > p["b"][None, :1], x @ p["w"], 0.0))

    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")
    run = jax.jit(lambda p, x: fn(p, x, direction=p, labels=jnp.zeros((2, 6), int), num_labels=1))
    rows = jax.jit(lambda p, x: fn(p, x, direction=p))(P, X)
    result = run(P, X)
    testing.assert_dots_close(
        result.dots, jax.tree.map(lambda leaf: leaf.sum(keepdims=True), rows.dots)
    )


@jax.custom_vjp
def clipped(x, scale):
    return x * scale[None]


clipped.defvjp(
    lambda x, scale: (clipped(x, scale), (x, scale)),
    lambda kept, g: (g * kept[1][None], jnp.sum(jnp.clip(g, -0.1, 0.1) * kept[0], axis=0)),
)


def test_rules_that_are_not_linear_on_flattened_positions():
    """A rule sees every position; padding is any negative number."""
    params = {"scale": draw(F, seed=5)}
    labels = jnp.array([[0, 1, 1, -1, 2, -2], [3, 3, 0, -3, 2, 1]])

    def losses(params, x):
        return jnp.sum(jnp.square(jnp.sin(clipped(x, params["scale"]))), axis=1)

    fn = value_grad_and_dots(
        lambda p, x: jnp.sum(losses(p, x.reshape(-1, F))), loss_reduction="sum"
    )
    direction = direction_like(params)
    run = jax.jit(lambda p, x, v: fn(p, x, direction=v, labels=labels, num_labels=4))
    result = run(params, X, direction)
    single = expected_dots(losses, params, X.reshape(-1, F), direction)
    of_label = [labels.ravel() == label for label in range(4)]
    expected = jax.tree.map(lambda leaf: np.stack([leaf[own].sum() for own in of_label]), single)
    testing.assert_dots_close(result.dots, expected)
    assert int(result.conflicts) == 0
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def test_negative_labels_of_positions_are_all_the_same():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(row_losses(p, x)))
    run = jax.jit(lambda p, x, ids: fn(p, x, direction=p, labels=ids, num_labels=2))
    ids = jnp.array([[0, 1, 1, 0, -1, -1], [1, 1, 0, -1, -1, -1]])
    one, other = run(P, X, ids), run(P, X, jnp.where(ids < 0, -2, ids))
    testing.assert_dots_close(one.dots, other.dots)
    assert int(other.conflicts) == 0
