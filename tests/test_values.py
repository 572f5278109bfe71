"""InRunValues against numpy's np.add.at, compiled, scanned, donated, and saved and restored."""

import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ghostjax.values import InRunValues

EXAMPLES, STEPS, BATCH = 11, 7, 6
NAMES = ("prose", "code", "maths")


def draw(kinds, seed=0):
    """Ids with repetitions and padding, and scores, of all steps."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, EXAMPLES, (STEPS, BATCH), np.int32)
    ids[:, 1] = ids[:, 0]
    ids[:, 3] = -1
    ids[2, 4] = -7
    return ids, np.float32(generator.normal(size=(STEPS, BATCH, kinds)))


def expected_of(ids, scores):
    values = np.zeros((EXAMPLES, scores.shape[-1]))
    visits = np.zeros(EXAMPLES, np.int32)
    is_row = ids >= 0
    np.add.at(values, ids[is_row], scores[is_row].astype(np.float64))
    np.add.at(visits, ids[is_row], 1)
    return values, visits


def in_a_loop(values, ids, scores):
    for step_ids, step_scores in zip(ids, scores):
        values = values.add(step_ids, step_scores)
    return values


def in_jit(values, ids, scores):
    add = jax.jit(InRunValues.add, donate_argnums=0)
    for step_ids, step_scores in zip(ids, scores):
        before = values
        values = add(values, step_ids, step_scores)
        assert before.values.is_deleted()
    return values


def in_scan(values, ids, scores):
    @jax.jit
    def run(values, ids, scores):
        return jax.lax.scan(lambda carry, now: (carry.add(*now), None), values, (ids, scores))[0]

    return run(values, ids, scores)


@pytest.mark.parametrize("names", [("val",), NAMES], ids=["one set", "three sets"])
@pytest.mark.parametrize("way", [in_a_loop, in_jit, in_scan])
def test_sum_over_steps_is_that_of_numpy(way, names):
    ids, scores = draw(len(names))
    found = way(InRunValues.zeros(EXAMPLES, names), ids, scores)
    values, visits = expected_of(ids, scores)
    np.testing.assert_allclose(found.values, values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.visits, visits)
    for number, name in enumerate(names):
        np.testing.assert_array_equal(found.of(name), found.values[:, number])
    assert found.names == names
    found.check()


def test_before_the_first_step():
    values = InRunValues.zeros(EXAMPLES, NAMES)
    chex.assert_shape((values.values, values.visits), ((EXAMPLES, 3), (EXAMPLES,)))
    chex.assert_shape(values.compensation, (EXAMPLES, 3))
    assert values.values.dtype == values.compensation.dtype == jnp.float32
    assert values.visits.dtype == values.rejected.dtype == jnp.int32
    assert not any(leaf.any() for leaf in jax.tree.leaves(values))


def test_one_set_takes_scores_with_or_without_its_axis():
    values = InRunValues.zeros(EXAMPLES)
    (ids, *_), (scores, *_) = draw(1)
    chex.assert_trees_all_equal(values.add(ids, scores), values.add(ids, scores[:, 0]))


@pytest.mark.quick("1e+30")
@pytest.mark.parametrize("score", [np.nan, np.inf, 1e30])
def test_padding_is_passed_over_whatever_its_score(score):
    values = InRunValues.zeros(3)
    found = values.add(jnp.array([-1, 2, -(2**31)]), jnp.array([score, 1.0, score]))
    np.testing.assert_array_equal(found.of("val"), [0, 0, 1])
    np.testing.assert_array_equal(found.visits, [0, 0, 1])
    chex.assert_trees_all_equal(values.add(jnp.array([-1]), jnp.array([score])), values)


def test_nan_stays_with_its_example():
    found = InRunValues.zeros(3).add(jnp.array([0, 1, 0]), jnp.array([1.0, 2.0, np.nan]))
    np.testing.assert_array_equal(found.of("val"), [np.nan, 2, 0])


def many(name):
    """Ids and scores [100_000, 4] of three examples."""
    generator = np.random.default_rng(2)
    shape = 100_000, 4
    ids = generator.integers(-1, 3, shape, np.int32)
    scores = {
        "alike": np.full(shape, 0.1),
        "positive": generator.random(shape),
        "of both signs": generator.normal(size=shape),
        "of many sizes": np.exp(4 * generator.normal(size=shape)),
    }
    return ids, np.float32(scores[name])


@pytest.mark.parametrize("name", ["alike", "positive", "of both signs", "of many sizes"])
def test_a_hundred_thousand_additions_are_rounded_once(name):
    ids, scores = many(name)
    found = in_scan(InRunValues.zeros(3), ids, scores[..., None])
    expected = np.zeros(3)
    np.add.at(expected, ids[ids >= 0], scores[ids >= 0].astype(np.float64))
    np.testing.assert_array_equal(found.of("val"), expected.astype(np.float32))
    both = np.float64(found.values) + np.float64(found.compensation)
    np.testing.assert_allclose(both[:, 0], expected, rtol=1e-10)


OPTIMIZED = """
import jax, jax.numpy as jnp, numpy as np
from ghostjax import InRunValues

steps = 100_000
ids, scores = np.int32([0, 0, 1, -1, 2]), np.float32([0.1, 0.7, 1e-3, 5.0, -3.3])
exact = steps * np.array([scores[:2].astype(np.float64).sum(), scores[2], scores[4]], np.float64)

def repeat(values, ids, scores):
    return jax.lax.scan(lambda c, _: (c.add(ids, scores), None), values, length=steps)[0]

given = jax.jit(repeat, donate_argnums=0)(InRunValues.zeros(3), ids, scores)
known = jax.jit(lambda v: repeat(v, jnp.asarray(ids), jnp.asarray(scores)))(InRunValues.zeros(3))
many = jax.jit(jax.vmap(repeat, (0, None, 0)))(
    jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), InRunValues.zeros(3)),
    ids, np.stack([scores, 2 * scores]),
)
for values in (given.values, known.values, many.values[0], many.values[1] / 2):
    assert np.array_equal(values[:, 0], np.float32(exact)), (values, exact)
"""


@pytest.mark.slow
def test_optimized_code_keeps_the_compensation():
    """The flags of these tests leave most optimizations out."""
    environment = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", OPTIMIZED], check=True, env=environment)


@pytest.mark.quick("2")
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 1000])
def test_rows_of_one_call_are_rounded_once(rows):
    generator = np.random.default_rng(rows)
    ids = generator.integers(0, 2, rows, np.int32)
    scores = np.float32(np.exp(6 * generator.normal(size=(rows, 2))))
    before = InRunValues.zeros(2, ("a", "b")).add(
        jnp.arange(2), jnp.float32([[1e6, -1], [3, 1e-6]])
    )
    expected = np.float64(before.values)
    np.add.at(expected, ids, scores.astype(np.float64))
    found = before.add(ids, scores)
    np.testing.assert_array_equal(found.values, expected.astype(np.float32))


def test_what_cancels_leaves_the_rest():
    ids = jnp.array([4, 1, 4, -1, 1, 4, 1])
    scores = jnp.array([1e8, -3e9, 1.0, np.nan, 0.5, -1e8, 3e9])
    found = InRunValues.zeros(5).add(ids, scores)
    np.testing.assert_array_equal(found.of("val"), [0, 0.5, 0, 0, 1])
    by_one = InRunValues.zeros(5)
    for row in range(7):
        by_one = by_one.add(ids[row : row + 1], scores[row : row + 1])
    chex.assert_trees_all_equal(by_one, found)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([np.inf, 1.0], np.inf), ([3e38, 3e38], np.inf), ([np.inf, -np.inf], np.nan)],
)
def test_infinite_values_stay_what_they_are(scores, expected):
    values = InRunValues.zeros(2).add(jnp.zeros(2, jnp.int32), jnp.array(scores))
    for found in (values, values.add(jnp.zeros(1, jnp.int32), jnp.ones(1))):
        np.testing.assert_array_equal(found.values[:, 0], [expected, 0])
        assert not found.compensation.any()


def test_no_rows_add_nothing():
    values = InRunValues.zeros(2).add(jnp.zeros(3, jnp.int32), jnp.full(3, 0.1))
    chex.assert_trees_all_equal(values.add(jnp.zeros(0, jnp.int32), jnp.zeros((0, 1))), values)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scores_of_fewer_bits_are_summed_in_float32(dtype):
    values = InRunValues.zeros(1)
    for _ in range(3):
        values = values.add(jnp.zeros(300, jnp.int8), jnp.ones(300, dtype))
    assert values.of("val") == 900
    assert values.values.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_ids_of_fewer_bits_than_the_number_of_examples(dtype):
    found = InRunValues.zeros(100_000).add(jnp.array([-1, 5], dtype), jnp.ones(2))
    np.testing.assert_array_equal(found.visits.nonzero()[0], [5])


def test_ids_known_when_the_step_is_compiled():
    ids, scores = jnp.array([1, 5]), jnp.ones(2)
    add = jax.jit(lambda values: values.add(ids, scores))
    found = add(InRunValues.zeros(3))
    np.testing.assert_array_equal(found.of("val"), [0, 1, 0])
    assert found.rejected == 1


TOO_LARGE = r"2 rows had an id of 3 or more, but there are 3 examples \(ids 0 to 2\): give"


def test_ids_out_of_range_are_an_error_outside_jit():
    with pytest.raises(ValueError, match=TOO_LARGE):
        InRunValues.zeros(3).add(jnp.array([3, 0, 2**31 - 1]), jnp.ones(3))


def test_ids_out_of_range_are_counted_in_jit_and_belong_to_no_example():
    add = jax.jit(InRunValues.add)
    values = add(InRunValues.zeros(3), jnp.array([3, 0, 1]), jnp.array([5.0, 1.0, 2.0]))
    values = add(values, jnp.array([2**31 - 1, 0, -1]), jnp.array([5.0, 1.0, 7.0]))
    np.testing.assert_array_equal(values.of("val"), [2, 2, 0])
    np.testing.assert_array_equal(values.visits, [2, 1, 0])
    with pytest.raises(ValueError, match=TOO_LARGE):
        values.check()


@pytest.mark.parametrize(
    ("ids", "scores", "error", "text"),
    [
        ((6,), (6, 2), ValueError, "scores [B, 3] for validation sets ('prose', 'code', 'maths')"),
        ((6,), (6,), ValueError, "got ids [6] and scores [6]."),
        ((6,), (5, 3), ValueError, "got ids [6] and scores [5, 3]."),
        ((2, 3), (2, 3, 3), ValueError, "got ids [2, 3] and scores [2, 3, 3]."),
        ((), (3,), ValueError, "got ids [] and scores [3]."),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_shapes_must_fit(ids, scores, error, text, compiled):
    add = jax.jit(InRunValues.add) if compiled else InRunValues.add
    with pytest.raises(error, match=re.escape(text)):
        add(InRunValues.zeros(4, NAMES), jnp.zeros(ids, jnp.int32), jnp.zeros(scores))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint32, jnp.bool_])
def test_ids_must_be_signed_integers(dtype):
    text = rf"ids must be signed integers \(negative: padding\), got {jnp.dtype(dtype).name}\."
    with pytest.raises(TypeError, match=text):
        InRunValues.zeros(4).add(jnp.zeros(2, dtype), jnp.zeros(2))


def test_scores_must_be_floating_point():
    with pytest.raises(TypeError, match=r"scores must be floating point, got int32\."):
        InRunValues.zeros(4).add(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))


def test_names_must_differ():
    for names in [(), ("a", "b", "a")]:
        with pytest.raises(ValueError, match="names must be different, at least one: got"):
            InRunValues.zeros(4, names)
    with pytest.raises(
        ValueError, match=r"no validation set 'val': there are prose, code, maths\."
    ):
        InRunValues.zeros(4, NAMES).of("val")


@pytest.mark.parametrize("n_examples", [0, -3])
def test_there_must_be_examples(n_examples):
    with pytest.raises(ValueError, match=f"n_examples must be at least 1, got {n_examples}"):
        InRunValues.zeros(n_examples)


def test_saved_and_restored_beside_the_train_state(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    ids, scores = draw(3)
    values = in_a_loop(InRunValues.zeros(EXAMPLES, NAMES), ids[:4], scores[:4])
    assert values.compensation.any()
    state = {"params": params, "optimizer": optax.adam(1e-3).init(params), "values": values}
    target = jax.tree.map(jnp.zeros_like, state)
    assert target["values"].names == NAMES
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    chex.assert_trees_all_equal(restored, state)
    assert restored["values"].names == NAMES
    chex.assert_trees_all_equal(
        in_a_loop(restored["values"], ids[4:], scores[4:]), in_a_loop(values, ids[4:], scores[4:])
    )
