"""The step on what nobody tests by hand: bad rows, odd weights, meshes, narrow and wide dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax.selection import by_score, select_step, top_k

N, V, F = 16, 8, 16
X, W = jax.random.normal(jax.random.key(0), (N + V, F)), jax.random.normal(jax.random.key(1), (F,))
BATCH = {"x": X[:N], "y": jnp.tile(jnp.array([1.0, -1.0]), N // 2)}
VAL = {"x": X[N:], "y": jnp.ones(V)}


def losses(params, batch):
    return jnp.square(jnp.tanh(batch["x"] @ params["w"]) - batch["y"])


def stepped(policy=by_score, k=4, params=None, batch=BATCH, val=VAL, optimizer=None, **options):
    optimizer = optax.adam(1e-2) if optimizer is None else optimizer
    params = {"w": W / 4} if params is None else params
    step = select_step(losses, optimizer, k, policy, **options)
    return step(params, optimizer.init(params), batch, val, key=jax.random.key(3))


def constantly(weights):
    return lambda rows, k: weights


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("clip", [False, True])
def test_a_bad_row_takes_no_score_from_others(bad, clip, standard_promotion):
    """Through the optimizer too, which sees the mean gradient of all."""
    optimizer = optax.sgd(0.1)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(1e3), optimizer)
    batch = BATCH | {"x": BATCH["x"].at[3].set(bad)}
    params, _, selected = stepped(k=N, batch=batch, optimizer=optimizer)
    assert selected.rows.tolist() == [*(n for n in range(N) if n != 3), -1]
    assert jnp.isfinite(params["w"]).all()
    assert jnp.isfinite(selected.value)
    plain = stepped(k=4, batch=batch, optimizer=optimizer, through_optimizer=False)[2]
    assert stepped(k=4, batch=batch, optimizer=optimizer)[2].rows.tolist() == plain.rows.tolist()


@pytest.mark.slow
def test_a_bad_row_leaves_the_choice_among_the_others(standard_promotion):
    """That is what it would be without the row, where every coordinate of the mean is lost."""
    optimizer = optax.adam(1e-2, eps=0.1)
    seen = []

    def policy(rows, k):
        seen.append(rows.scores)
        return by_score(rows, k)

    with jax.disable_jit():
        stepped(policy, batch=BATCH | {"x": BATCH["x"].at[3].set(np.nan)}, optimizer=optimizer)
        others = jax.tree.map(lambda leaf: jnp.delete(leaf, 3, axis=0), BATCH)
        stepped(policy, batch=others, optimizer=optimizer)
    found, expected = seen
    assert jnp.isnan(found[3])
    assert jnp.abs(expected).min() > 0
    np.testing.assert_allclose(jnp.delete(found, 3), expected, rtol=1e-4)


def test_all_rows_make_a_plain_step():
    params, _, selected = stepped(k=N, optimizer=optax.sgd(0.1))
    assert selected.rows.tolist() == list(range(N))
    value, grads = jax.value_and_grad(lambda p: losses(p, BATCH).mean())({"w": W / 4})
    np.testing.assert_allclose(selected.value, value, rtol=1e-6)
    np.testing.assert_allclose(params["w"], W / 4 - 0.1 * grads["w"], rtol=1e-5)


def test_a_bad_validation_row_leaves_everything_as_it_was(standard_promotion):
    val = VAL | {"y": VAL["y"].at[0].set(np.nan)}
    params, _, selected = stepped(val=val)
    assert selected.rows.tolist() == [-1] * 4
    assert jnp.isnan(selected.value)
    np.testing.assert_array_equal(params["w"], W / 4)


@pytest.mark.quick("1e-40")
@pytest.mark.parametrize("scale", [1.0, 3e38, 1e-40])
def test_weights_of_any_size_weigh_alike(scale, standard_promotion):
    weights = np.float32(scale) * np.float32([1, 0.5, 0, 1] * 4)
    params, _, selected = stepped(constantly(weights), optimizer=optax.sgd(0.1))
    assert selected.rows.tolist() == [0, 3, 4, 7]
    grads = jax.grad(lambda p: losses(p, BATCH)[np.array([0, 3, 4, 7])].mean())({"w": W / 4})
    np.testing.assert_allclose(params["w"], W / 4 - 0.1 * grads["w"], rtol=1e-5)


def test_infinite_weights_are_not_trained_on(standard_promotion):
    weights = np.ones(N, np.float32)
    weights[:13] = [np.inf, -np.inf, np.nan, -1] + [0] * 9
    params, _, selected = stepped(constantly(weights))
    assert selected.rows.tolist() == [13, 14, 15, -1]
    assert jnp.isfinite(params["w"]).all()


def test_patterns_may_come_from_an_iterator():
    params = {"w": W / 4, "bias": jnp.zeros(())}
    optimizer = optax.sgd(0.1)

    def with_bias(params, batch):
        return losses(params, batch) + params["bias"] ** 2

    step = select_step(with_bias, optimizer, 1, exclude=(own for own in ["bais"]))
    for rows in (8, 4):  # traced twice
        batch = {key: leaf[:rows] for key, leaf in BATCH.items()}
        with pytest.raises(ValueError, match="fit no parameter: 'bais'"):
            step(params, optimizer.init(params), batch, VAL)


@pytest.mark.parametrize("k", [2.0, "2", None])
def test_k_must_be_an_int(k):
    with pytest.raises(TypeError, match=r"k must be a Python int .* got"):
        stepped(k=k)
    with pytest.raises(TypeError, match=r"k must be a Python int .* got"):
        top_k(jnp.ones(3), k)


def test_narrow_parameters_stay_narrow(standard_promotion):
    params, batch, val = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), ({"w": W / 4}, BATCH, VAL)
    )
    after, _, selected = stepped(params=params, batch=batch, val=val, k=3)
    assert after["w"].dtype == jnp.bfloat16
    assert selected.weights.dtype == jnp.float32
    assert (after["w"] != params["w"]).any()
    assert len(set(selected.rows.tolist())) == 3


@pytest.mark.slow
def test_wide_parameters_are_stepped_as_widely(standard_promotion):
    with jax.enable_x64(True):
        arrays = {"w": W / 4}, BATCH, VAL
        params, batch, val = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), arrays)
        optimizer = optax.sgd(0.1)
        after, _, selected = stepped(
            params=params, batch=batch, val=val, k=3, optimizer=optimizer, through_optimizer=False
        )
        grads = jax.grad(lambda p: losses(p, batch)[selected.rows].mean())(params)
        np.testing.assert_allclose(after["w"], params["w"] - 0.1 * grads["w"], rtol=1e-13)


@pytest.mark.quick("explicit-4")
@pytest.mark.parametrize("k", [8, 4])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_rows_split_over_devices(axis_type, k, standard_promotion):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    optimizer = optax.sgd(0.1, momentum=0.9)  # Adam's first step has scores of rounding
    expected, _, plain = stepped(k=k, optimizer=optimizer)
    with jax.set_mesh(mesh):
        params = jax.device_put({"w": W / 4}, NamedSharding(mesh, PartitionSpec()))
        batch, val = jax.device_put((BATCH, VAL), rows)
        found, _, selected = stepped(params=params, batch=batch, val=val, k=k, optimizer=optimizer)
    assert selected.rows.tolist() == plain.rows.tolist()
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5)
