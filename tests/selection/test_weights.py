"""Weights from scores, by hand and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import value_grad_and_dots
from ghostjax.selection import softmax, threshold, top_k

NAN, INF = np.nan, np.inf
RULES = {
    "threshold": threshold,
    "top_k": lambda scores: top_k(scores, 2),
    "softmax": softmax,
}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, 3.0], [1, 1, 1]),
        ([1.0, -2.0, 3.0, -4.0], [2, 0, 2, 0]),
        ([0.0, -0.0, -1.0], [1.5, 1.5, 0]),
        ([NAN, 1.0, -1.0], [0, 3, 0]),
        ([INF, -INF], [2, 0]),
        ([-1.0, NAN, -INF], [0, 0, 0]),
        ([-1e-40, 1e-45, -1e-45], [0, 3, 0]),
    ],
    ids=["all", "some", "zeros stay", "nan", "infinite", "none", "subnormal"],
)
def test_threshold(scores, expected):
    np.testing.assert_array_equal(threshold(jnp.array(scores)), np.float32(expected))


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1.0, 4.0, -3.0, 2.0], 2, [0, 2, 0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 3, [4 / 3, 4 / 3, 4 / 3, 0]),
        ([0.0, 2.0, 1.0, 1.0], 2, [0, 2, 2, 0]),
        ([-1.0, -2.0], 2, [1, 1]),
        ([NAN, -INF, 1.0, -2.0], 2, [0, 0, 2, 2]),
        ([NAN, NAN, 1.0, NAN], 2, [0, 0, 4, 0]),
        ([NAN, -INF], 1, [0, 2]),
        ([-0.0, 0.0], 1, [2, 0]),
        ([0.0, -0.0], 1, [2, 0]),
        ([-INF, NAN, NAN], 2, [3, 0, 0]),
        ([NAN, NAN], 1, [0, 0]),
        ([1e-45, 2e-40, -1e-40, 1e-40], 2, [0, 2, 0, 2]),
        ([3.4e38, INF, -3.4e38, -INF], 3, [4 / 3, 4 / 3, 4 / 3, 0]),
    ],
)
def test_top_k(scores, k, expected):
    np.testing.assert_array_equal(top_k(jnp.array(scores), k), np.float32(expected))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match=rf"k must be from 1 to the number of rows, 3, got {k}\."):
        top_k(jnp.ones(3), k)


def test_softmax_by_hand():
    scores = np.array([1.0, -2.0, 0.5, 4.0], np.float32)
    expected = np.exp(scores / (0.5 * scores.std()))
    expected *= 4 / expected.sum()
    np.testing.assert_allclose(softmax(jnp.asarray(scores), 0.5), expected, rtol=1e-5)


def test_softmax_between_its_limits():
    scores = jnp.array([1.0, -2.0, 0.5, 4.0])
    np.testing.assert_allclose(softmax(scores, 1e6), np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(softmax(scores, 1e-3), [0, 0, 0, 4], atol=1e-6)
    np.testing.assert_array_equal(softmax(jnp.full(3, -7.0)), np.ones(3))


def test_softmax_does_not_depend_on_the_unit_or_the_origin():
    scores = jnp.array([1.0, -2.0, 0.5, 4.0])
    np.testing.assert_allclose(softmax(1e-6 * scores), softmax(scores), rtol=1e-5)
    np.testing.assert_allclose(softmax(scores + 8.0), softmax(scores), rtol=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_softmax_of_other_rows_is_as_if_a_bad_row_were_not_there(bad):
    scores = jnp.array([1.0, bad, 0.5, 4.0])
    others = jnp.array([1.0, 0.5, 4.0])
    expected = np.insert(np.asarray(softmax(others)) * 4 / 3, 1, 0)
    np.testing.assert_allclose(softmax(scores), expected, rtol=1e-6)
    np.testing.assert_array_equal(softmax(jnp.full(2, bad)), np.zeros(2))


def softmax_of_numpy(scores, temperature=1.0):
    """In float64, over the finite scores."""
    scores = np.asarray(scores, np.float32).astype(np.float64)
    finite = scores[np.isfinite(scores)]
    weights = np.zeros(scores.shape)
    spread = finite.std()
    scaled = (finite - finite.max()) / (temperature * spread if spread > 0 else 1)
    weights[np.isfinite(scores)] = np.exp(scaled) / np.exp(scaled).sum()
    return weights * len(scores)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "scores",
    [
        [1e38, -3e38],
        [3e38, 3e38, -3e38],
        [3.4e38, -3.4e38, 1.0, 1e-45],
        [1e-40, 2e-40, 3e-40],
        [-2e-38, 1e-38, 5e-39, -3e-40],
        [1e-45, 0.0, -1e-45],
        [1.0, 1.0000001, 1.0000002],
        [-7e37, NAN, 3e38, INF, -1e38, -INF],
        [5.0],
        [-3e38],
        [3.4e38] * 3,
        [0.1] * 3,
        [1e-45] * 2,
        [0.0, -0.0],
    ],
    ids=str,
)
def test_softmax_of_any_scores_there_are(scores, compiled):
    found = (jax.jit(softmax) if compiled else softmax)(jnp.array(scores, jnp.float32))
    np.testing.assert_allclose(found, softmax_of_numpy(scores), rtol=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(1e-40, [0, 2]), (1e40, [1, 1])])
def test_temperatures_beyond_float32(temperature, expected):
    np.testing.assert_array_equal(softmax(jnp.array([1.0, 2.0]), temperature), expected)


@pytest.mark.parametrize("temperature", [0, -1.0, NAN])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        softmax(jnp.ones(2), temperature)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_scores_must_be_one_float_per_row(rule):
    with pytest.raises(ValueError, match=r"scores must be floating point \[B\], got int32\(3,\)"):
        rule(jnp.arange(3))
    with pytest.raises(ValueError, match=r"got float32\(3, 1\)"):
        rule(jnp.ones((3, 1)))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_softmax_knows_no_scale(size):
    scores = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(softmax(size * scores), softmax(scores), rtol=1e-5)


@pytest.mark.quick("top_k-float32", "threshold-float32")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_weights_are_float32_with_mean_one_in_jit_as_outside(rule, dtype):
    scores = jax.random.normal(jax.random.key(0), (16,), dtype)
    weights = rule(scores)
    assert weights.dtype == jnp.float32
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(rule)(scores), weights, rtol=1e-6)
    stacked = jnp.stack([scores, -scores])
    np.testing.assert_allclose(jax.vmap(rule)(stacked)[0], weights, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_gradient_flows_through_weights(rule):
    scores = jnp.array([1.0, -2.0, 0.5, 4.0])
    grads = jax.grad(lambda scores: jnp.sum(rule(scores) * scores))(scores)
    np.testing.assert_allclose(grads, rule(scores), rtol=1e-6)


CLASSES, DIM, BATCH, STEPS, RATE = 4, 16, 32, 400, 0.3


def noisy_problem(seed):
    """Two clusters per class; 40% of the training labels are wrong."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(2 * CLASSES, DIM))

    def rows(count):
        clusters = generator.integers(0, 2 * CLASSES, count)
        x = centres[clusters] + 0.6 * generator.normal(size=(count, DIM))
        return {"x": np.float32(x), "y": np.int32(clusters % CLASSES)}

    train, val, test = rows(256), rows(64), rows(1000)
    is_wrong = generator.random(256) < 0.4
    shift = generator.integers(1, CLASSES, 256)
    train["y"] = np.int32(np.where(is_wrong, (train["y"] + shift) % CLASSES, train["y"]))
    places = np.int32([generator.choice(256, BATCH, replace=False) for _ in range(STEPS)])
    params = {
        "hidden": np.float32(generator.normal(size=(DIM, DIM)) / np.sqrt(DIM)),
        "bias": np.zeros((1, DIM), np.float32),
        "out": np.float32(generator.normal(size=(DIM, CLASSES)) / np.sqrt(DIM)),
    }
    return jax.tree.map(jnp.asarray, (params, train, val, test, places))


def logits_of(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]


def row_losses(params, batch):
    logs = jax.nn.log_softmax(logits_of(params, batch["x"]))
    return -jnp.take_along_axis(logs, batch["y"][:, None], axis=1)[:, 0]


def mean_loss(params, batch):
    return row_losses(params, batch).mean()


@jax.jit
def trained(drop, params, train, val, test, places):
    """Test accuracy after SGD, with rows dropped where ``drop`` is true, and what was dropped."""

    def step(params, places):
        batch = jax.tree.map(lambda leaf: leaf[places], train)
        direction = jax.grad(mean_loss)(params, val)
        scores = value_grad_and_dots(mean_loss)(params, batch, direction=direction).total()
        weights = jnp.where(drop, threshold(scores), 1.0)
        grads = jax.grad(lambda params: jnp.mean(weights * row_losses(params, batch)))(params)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads), weights > 0

    params, kept = jax.lax.scan(step, params, places)
    return jnp.mean(jnp.argmax(logits_of(params, test["x"]), 1) == test["y"]), kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_training_without_negative_rows_beats_training_on_all(seed):
    problem = noisy_problem(seed)
    on_all, everything = trained(False, *problem)
    on_positive, kept = trained(True, *problem)
    assert everything.all()
    assert 0.4 < kept.mean() < 0.8
    assert on_positive > on_all + 0.1
