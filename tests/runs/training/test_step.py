"""The jitted step: training unchanged, and scores against per-row autodiff."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import directions, testing
from ghostjax.runs import models
from ghostjax.runs.data.batches import make_rows
from ghostjax.runs.data.text import Coder, Texts, TextTask
from ghostjax.runs.models import GPT, SIZES
from ghostjax.runs.training.gradients import GROUPS, PARTS, in_groups, make_directed
from ghostjax.runs.training.optimizers import make_optimizer, make_schedule
from ghostjax.runs.training.step import (
    AUDITED_ONLY,
    TrainState,
    _by_kind,
    _differentiate,
    _make_audit,
    _make_score,
    make_plain_step,
    make_step,
)

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

NUM_TRAIN, LENGTH, SETS = 4, 16, 2
TEXTS = [
    np.frombuffer(text, np.uint8)
    for text in (b"one and two", b"two and three and four", b"x = y[0]", b"for x in y:", b"to, fro")
]
NO_TEXTS = Texts([], np.array([], int), Coder(list, list, 256))
TASK = TextTask(NO_TEXTS, {}, GPT(SIZES["micro"]), LENGTH)
ROW_LOSSES = jax.jit(TASK.row_losses)


def rows_of(*indices):
    return make_rows([TEXTS[n] for n in indices], [0] * len(indices), LENGTH)


BATCHES = [rows_of(0, 1, 2, 3), rows_of(3, 4, 1, 0), rows_of(2, 1, 0, 4)]
HELD_OUT = [rows_of(4, 1, 0, 2), rows_of(2, 2, 3, 0)]  # one for each of the validation sets
VAL = jax.tree.map(
    lambda *leaves: np.stack(leaves).reshape(SETS, PARTS, 2, *leaves[0].shape[1:]), *HELD_OUT
)


def mean_loss(params, rows):
    return jnp.mean(TASK.row_losses(params, rows))


ROWS_GRADIENTS = jax.jit(functools.partial(testing.per_example_grads, TASK.row_losses))
MEAN_LOSS, GRADIENT = jax.jit(mean_loss), jax.jit(jax.grad(mean_loss))


@pytest.fixture(scope="module")
def optimizer():
    params = jax.eval_shape(lambda: TASK.init_params(0))
    with jax.numpy_dtype_promotion("standard"):
        return make_optimizer("adamw", make_schedule(1e-2, len(BATCHES)), 1.0, params)


@pytest.fixture(scope="module")
def kinds():
    return list(range(len(jax.tree.leaves(TASK.init_params(0)))))


@pytest.fixture(scope="module")
def step(optimizer, kinds):
    return make_step(TASK.row_losses, optimizer, kinds, order=1)


def start(optimizer):
    params = TASK.init_params(0)
    return TrainState(params, optimizer.init(params))


def difference(left, right):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), left, right)))


def groups_of(held_out):
    """The groups of a validation set's rows, of which one is measured at every step."""
    count = PARTS * GROUPS if len(held_out["mask"]) % (PARTS * GROUPS) == 0 else PARTS
    return [
        jax.tree.map(lambda leaf, n=n: np.split(leaf, count)[n], held_out) for n in range(count)
    ]


@pytest.mark.slow
def test_a_row_loss_is_the_mean_over_its_own_tokens():
    params = TASK.init_params(0)
    padded = ROW_LOSSES(params, rows_of(0))
    exact = ROW_LOSSES(params, make_rows([TEXTS[0]], [0], len(TEXTS[0]) - 1))
    np.testing.assert_allclose(padded, exact, rtol=1e-5)
    np.testing.assert_allclose(padded, np.log(256), rtol=0.02)


def check_measured(record, params, updates, point):
    """Predicted and actual decrease are those of the group of which most is predicted."""
    after = jax.tree.map(jnp.add, params, updates)
    for k, held_out in enumerate(HELD_OUT):
        groups = groups_of(held_out)
        predicted = [-optax.tree.vdot(GRADIENT(point, rows), updates) for rows in groups]
        rows = groups[np.argmax(np.abs(predicted))]
        actual = MEAN_LOSS(params, rows) - MEAN_LOSS(after, rows)
        largest = max(predicted, key=abs)
        np.testing.assert_allclose(record.steps["predicted"][k], largest, rtol=1e-3)
        np.testing.assert_allclose(record.steps["actual"][k], actual, atol=2e-6)


@pytest.mark.slow
def test_the_step_is_that_without_scores(optimizer, step):
    @jax.jit
    def plain_step(params, opt_state, rows):
        loss, grads = jax.value_and_grad(mean_loss)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    state, plain = start(optimizer), TASK.init_params(0)
    opt_state = optimizer.init(plain)
    for rows in BATCHES:
        plain, opt_state, loss = plain_step(plain, opt_state, rows)
        before = jax.tree.map(jnp.copy, state.params)
        state, record = step(state, rows, VAL)
        np.testing.assert_allclose(record.steps["loss"], loss, rtol=1e-5)
        val_losses = [MEAN_LOSS(before, held_out) for held_out in HELD_OUT]
        np.testing.assert_allclose(record.steps["val_loss"], val_losses, rtol=1e-5)
        updates = jax.tree.map(jnp.subtract, state.params, before)
        check_measured(record, before, updates, before)
        assert record.steps["conservation_error"].max() < 1e-4
        assert np.isnan([record.steps[name] for name in AUDITED_ONLY]).all()
    assert difference(plain, TASK.init_params(0)) > 1e-3
    # Adam divides by the root of squares, which makes much of rounding where gradients vanish.
    assert difference(plain, state.params) < 1e-5


@pytest.fixture(scope="module")
def warm(optimizer, step):
    """Makes states after two steps: at the first, Adam's derivative is rounding."""
    with jax.numpy_dtype_promotion("standard"):

        def make():
            state = start(optimizer)
            for rows in BATCHES[:2]:
                state, _ = step(state, rows, VAL)
            return state

        yield make


@functools.partial(jax.jit, static_argnums=0)
def decrease(optimizer, state, grads, val_grads, row):
    """The decrease of the validation loss per share of a row in the update, by forward mode."""

    def update(grads):
        return optimizer.update(grads, state.opt_state, state.params)[0]

    share = jax.tree.map(lambda leaf: leaf / NUM_TRAIN, row)
    moved = jax.jvp(update, (grads,), (share,))[1]
    # Bytes that have not occurred yet: 0 * inf, by definition zero.
    moved = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), moved)
    return -optax.tree.vdot(val_grads, moved)


def expected_scores(optimizer, state, val_grads):
    rows = ROWS_GRADIENTS(state.params, BATCHES[2])
    grads = jax.tree.map(lambda leaf: leaf.mean(0), rows)
    each = [jax.tree.map(lambda leaf, n=n: leaf[n], rows) for n in range(NUM_TRAIN)]
    return np.array([decrease(optimizer, state, grads, val_grads, row) for row in each])


def plain_scores(params, val_grads):
    rows = [jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], BATCHES[2]) for n in range(NUM_TRAIN)]
    return [optax.tree.vdot(val_grads, GRADIENT(params, one)) for one in rows]


def test_scores_are_those_of_per_row_autodiff(optimizer, step, warm):
    state = warm()
    expected = [
        expected_scores(optimizer, state, GRADIENT(state.params, held_out)) for held_out in HELD_OUT
    ]
    half = jax.tree.map(lambda leaf: leaf[:2], HELD_OUT[0])
    of_half = expected_scores(optimizer, state, GRADIENT(state.params, half))
    val_grads = GRADIENT(state.params, HELD_OUT[0])
    plain = plain_scores(state.params, val_grads)
    before = jax.tree.map(jnp.copy, state.params)
    after, record = step(state, BATCHES[2], VAL, np.array([1, 3], np.int32))
    for scores, wanted in zip(record.scores["score"], expected):
        testing.assert_dots_close(scores, wanted, rtol=1e-4)
    # Of two halves, the standard error of their mean is half of their difference.
    testing.assert_dots_close(record.scores["error"][0], np.abs(of_half - expected[0]), rtol=1e-3)
    np.testing.assert_allclose(
        record.kinds.sum(axis=1), np.abs(record.scores["score"]).sum(axis=1), rtol=1e-4
    )
    np.testing.assert_allclose(
        record.steps["correlation"][0],
        np.corrcoef(plain, record.scores["score"][0])[0, 1],
        rtol=1e-4,
    )
    check_measured(record, before, jax.tree.map(jnp.subtract, after.params, before), before)
    np.testing.assert_allclose(record.scores["loss"], ROW_LOSSES(before, BATCHES[2]), rtol=1e-5)
    assert record.steps["audit_error"].max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "passes"), [(False, 1), (True, 2)])
def test_forward_passes_over_the_training_rows(optimizer, kinds, remat, passes):
    """Told by the activations of the perceptrons."""
    step = make_step(TASK.row_losses, optimizer, kinds, order=2, remat=remat)
    jaxpr = jax.make_jaxpr(step)(start(optimizer), BATCHES[0], VAL)
    hidden = rf"f32\[{NUM_TRAIN},{LENGTH},{4 * SIZES['micro'].features}\] = tanh"
    assert len(re.findall(hidden, str(jaxpr))) == passes * SIZES["micro"].layers


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"microbatches": 2}, {"remat": True}], ids=str)
def test_saving_memory_changes_nothing_else(optimizer, step, warm, kinds, options):
    split = make_step(TASK.row_losses, optimizer, kinds, order=1, **options)
    state, record = step(warm(), BATCHES[2], VAL)
    found_state, found = split(warm(), BATCHES[2], VAL)
    for name in ("score", "error"):
        for one, other in zip(found.scores[name], record.scores[name]):
            testing.assert_dots_close(one, other, rtol=1e-4)
    np.testing.assert_allclose(found.scores["loss"], record.scores["loss"], rtol=1e-5)
    assert found.steps["conservation_error"].max() < 1e-4
    assert difference(found_state.params, state.params) < 1e-5


@pytest.mark.slow
def test_a_rematerialized_loop_over_layers_changes_nothing(optimizer, monkeypatch):
    size = dataclasses.replace(SIZES["micro"], layers=3)
    records = []
    for few, remat in ((3, False), (0, True)):
        monkeypatch.setattr(models, "FEW_LAYERS", few)  # compiled one by one
        task = TextTask(NO_TEXTS, {}, GPT(size, remat=remat), LENGTH)
        params = task.init_params(0)
        state = TrainState(params, optimizer.init(params))
        step = make_step(task.row_losses, optimizer, [0] * len(jax.tree.leaves(params)), order=2)
        lowered = jax.jit(task.row_losses).lower(params, BATCHES[0])
        has_loop = "while" in lowered.as_text()
        assert has_loop == (few == 0)
        for rows in BATCHES:
            state, record = step(state, rows, VAL, np.array([1, 3], np.int32))
        records.append(record)
    one_by_one, loop = records
    for name in ("score", "error"):
        for own, expected in zip(loop.scores[name], one_by_one.scores[name]):
            testing.assert_dots_close(own, expected, rtol=1e-3)
    np.testing.assert_allclose(loop.scores["loss"], one_by_one.scores["loss"], rtol=1e-5)
    assert loop.steps["conservation_error"].max() < 1e-4
    assert loop.steps["audit_error"].max() < 1e-4


@pytest.mark.slow
def test_order_2_goes_half_way_along_the_update(optimizer, warm, kinds):
    step = make_step(TASK.row_losses, optimizer, kinds, order=2)
    state = warm()
    grads = GRADIENT(state.params, BATCHES[2])
    updates = jax.jit(optimizer.update)(grads, state.opt_state, state.params)[0]
    midpoint = jax.jit(functools.partial(directions.midpoint, mean_loss))
    expected, plain = [], []
    for held_out in HELD_OUT:
        middle = midpoint(state.params, updates, held_out)
        expected.append(expected_scores(optimizer, state, middle))
        plain.append(plain_scores(state.params, middle))
    params = warm().params
    half_way = jax.tree.map(lambda leaf, update: leaf + update / 2, params, updates)
    _, record = step(state, BATCHES[2], VAL, np.array([1, 3], np.int32))
    for scores, wanted in zip(record.scores["score"], expected):
        testing.assert_dots_close(scores, wanted, rtol=1e-4)
    check_measured(record, params, updates, half_way)
    val_losses = [MEAN_LOSS(half_way, held_out) for held_out in HELD_OUT]
    np.testing.assert_allclose(record.steps["val_loss"], val_losses, rtol=1e-5)
    correlations = [np.corrcoef(pair)[0, 1] for pair in zip(plain, record.scores["score"])]
    np.testing.assert_allclose(record.steps["correlation"], correlations, rtol=1e-4)
    # Better than at the parameters, where nothing is known of the curvature.
    _, first = make_step(TASK.row_losses, optimizer, kinds, order=1)(warm(), BATCHES[2], VAL)
    errors = [np.abs(each.steps["predicted"] - each.steps["actual"]) for each in (record, first)]
    assert (errors[0] < errors[1]).all()


@pytest.mark.parametrize(("rows", "groups"), [(1, 2), (2, 4), (3, 2), (8, 4)])
def test_groups_lie_within_parts(rows, groups):
    """Each of the sets has its own; those of odd parts are the parts themselves."""
    val_rows = np.arange(SETS * PARTS * rows).reshape(SETS, PARTS, rows)
    np.testing.assert_array_equal(in_groups(val_rows), val_rows.reshape(SETS, groups, -1))


def loops_of(loss, is_saving):
    """The lengths of loops in a program that makes directions; five rows in every group."""
    optimizer, params = optax.sgd(0.1), {"w": jnp.ones(3)}
    directed = make_directed(loss, optimizer, 2, is_saving=is_saving)
    args = params, optimizer.init(params), params, params, jnp.ones((SETS, PARTS, 5 * GROUPS, 3))
    program = str(jax.make_jaxpr(directed)(*args))
    return [int(length) for length in re.findall(r"scan\[.*?length=(\d+)", program, re.DOTALL)]


def test_groups_are_differentiated_a_set_at_once_unless_memory_is_saved():
    def loss(params, rows):
        return jnp.square(rows @ params["w"])

    assert loops_of(loss, is_saving=False) == [SETS]
    assert loops_of(loss, is_saving=True) == [SETS * PARTS * GROUPS]


def test_a_loss_that_jax_cannot_vectorize_is_differentiated_group_by_group():
    @jax.custom_batching.custom_vmap
    def alone(x):
        return x

    @alone.def_vmap
    def _(size, batched, x):
        raise NotImplementedError

    def loss(params, rows):
        return jnp.square(alone(rows) @ params["w"])

    assert loops_of(loss, is_saving=False) == [SETS * PARTS * GROUPS]


def test_kinds_are_sums_over_their_parameters():
    rng = np.random.default_rng(0)
    dots = {name: rng.normal(size=(SETS * PARTS, NUM_TRAIN)) for name in "abc"}
    parts = np.stack([*dots.values()]).reshape(3, SETS, PARTS, NUM_TRAIN)
    of_leaf = parts.mean(2) / NUM_TRAIN
    scores = of_leaf.sum(0)
    expected = (of_leaf * np.sign(scores)).sum(-1)
    dots, scores = jax.tree.map(jnp.float32, (dots, scores))
    each, two = _by_kind(dots, [0, 1, 2], scores), _by_kind(dots, [0, 1, 0], scores)
    np.testing.assert_allclose(each, expected.T, rtol=1e-5)
    np.testing.assert_allclose(two, np.stack([expected[0] + expected[2], expected[1]], 1), 1e-5)


@pytest.mark.quick("1", "2", "3")
@pytest.mark.parametrize("part", range(SETS * PARTS))
def test_certificate_and_audit_are_of_every_set_and_part(part):
    """A wrong dot for any part of any set shows in the errors of this set, and only there."""

    def row_losses(params, rows):
        return jnp.square(rows["x"] @ params["w"]) / 2

    params = {"w": jnp.array([1.0, 2.0])}
    rows = {"x": jnp.array([[1.0, 0.5], [0.2, -1.0], [0.3, 0.1]])}
    losses, grads, late = _differentiate(row_losses, 1, False)(params, rows)
    count = SETS * PARTS
    direction = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(count, 2)), "f4")}

    class Wrong:
        def result(self, direction):
            found = late.result(direction)
            wrong = {"w": found.dots["w"].at[part, 1].multiply(1.5)}
            return dataclasses.replace(found, dots=wrong)

    for dots, is_broken in ((late, False), (Wrong(), True)):
        score = _make_score(row_losses, [0], 1)
        record, audited = score(params, rows, losses, grads, dots, direction)
        errors = _make_audit(row_losses)(params, rows, jnp.array([0, 1]), direction, *audited)
        own = np.arange(SETS) == part // PARTS
        for found in (record.steps["conservation_error"], errors):
            assert ((np.asarray(found) > 1e-3) == (own & is_broken)).all()
            assert (np.asarray(found)[~own] < 1e-5).all()


@pytest.mark.slow
def test_the_plain_step_is_the_same_training(optimizer, step, warm):
    plain = make_plain_step(TASK.row_losses, optimizer)
    state, record = step(warm(), BATCHES[2], VAL)
    found, losses = plain(warm(), BATCHES[2])
    assert difference(found.params, state.params) < 1e-5
    np.testing.assert_allclose(losses, record.scores["loss"], rtol=1e-5)
