"""What value_grad_and_dots refuses, and the certificate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots
from ghostjax.core import Meeting
from models.arrays import FEATURES, ROWS, direction_like, draw, mean_squares
from tests.dots.checks import DENSE, X, dense
from tests.variants import crossed

PERMUTED = jnp.array([1, 0, 2, 3, 5, 4])


def batch_norm(h):
    model = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)
    stats = {"mean": jnp.zeros(h.shape[1]), "var": jnp.ones(h.shape[1])}
    return model.apply({"batch_stats": stats}, h, mutable=["batch_stats"])[0]


def carry_that_is_a_parameter_first(p, x):
    start = jnp.broadcast_to(p["b"][None], (6, 4))
    return jax.lax.scan(lambda c, _: (x[::-1, :4], c), start, None, length=2)[1]


def branch_that_is_a_parameter(p, x):
    return jax.lax.cond(True, lambda: jnp.broadcast_to(p["b"][None], (6, 4)), lambda: x[::-1, :4])


MIXING = {
    "batch_norm": lambda p, x: dense(p, x) - dense(p, x).mean(0, keepdims=True),
    "batch_norm_jitted": lambda p, x: jax.jit(lambda h: h - h.mean(0, keepdims=True))(dense(p, x)),
    "batch_norm_flax": lambda p, x: batch_norm(dense(p, x)),
    "softmax_over_rows": lambda p, x: jax.nn.softmax(dense(p, x), axis=0),
    "running_total": lambda p, x: jnp.cumsum(dense(p, x), axis=0) @ p["w"].T,
    "running_total_of_inputs": lambda p, x: jnp.cumsum(x, axis=0) @ p["w"],
    "prefix_scan": lambda p, x: jax.lax.associative_scan(jnp.add, x, axis=0) @ p["w"],
    "covariance": lambda p, x: jnp.einsum("bi,bo->io", dense(p, x), dense(p, x)),
    "summed_products": lambda p, x: jnp.sin(jnp.einsum("bi,bf->if", dense(p, x), x)) @ p["w"],
    "all_pairs": lambda p, x: (x[:, None] * x[None]) @ p["w"],
    "carry_that_is_a_parameter_first": carry_that_is_a_parameter_first,
    "branch_that_is_a_parameter": branch_that_is_a_parameter,
    "contrastive": lambda p, x: jax.nn.log_softmax(dense(p, x) @ dense(p, x).T),
    "sorted": lambda p, x: jnp.sort(dense(p, x), axis=0) @ p["w"].T,
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_rows_are_an_error_that_names_the_place(name):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(jnp.square(MIXING[name](p, x))))
    with pytest.raises(ValueError, match=r"test_errors\.py:\d+(.|\n)*coupled=\"share\""):
        fn(DENSE, X, direction=DENSE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch_norm", r"sub at .*combines rows with a value in which rows are mixed \(reduce_sum"),
        ("contrastive", r"dot_general at .*combines rows with other rows \(.*different places"),
        ("carry_that_is_a_parameter_first", r"parameter \['b'\] meets data in scan at"),
        ("branch_that_is_a_parameter", r"parameter \['b'\] meets data in cond at"),
    ],
)
def test_what_is_said_of_mixed_rows(name, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(jnp.square(MIXING[name](p, x))))
    with pytest.raises(ValueError, match=message):
        fn(DENSE, X, direction=DENSE)


def test_a_primitive_that_is_not_known():
    def loss_fn(params, x):
        return jnp.mean(params["w"] * jax.lax.linalg.symmetric_product(x, jnp.zeros((6, 6))))

    params = {"w": draw(6, 6)}
    message = r"\['w'\] meets data in mul at .*symmetric_product at .*is not known to keep rows"
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(loss_fn)(params, X, direction=params)


def merged_in_the_wrong_order(x):
    """[B, 2B, ...] -> time first -> [B, 2B, ...] again: row r is at [:, r] and [:, B + r]."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape)


def through_two_orders(layer, x, rows):
    h = jnp.tanh(layer(x, rows))
    return layer(merged_in_the_wrong_order(h), merged_in_the_wrong_order(rows))


# What mixes rows only after the last parameter leaves every row a share of its own.
SHARES = {
    "maximum": lambda layer, x, rows: jnp.max(jnp.mean(layer(x, rows) ** 2, axis=(1, 2))),
    "log_sum_exp": lambda layer, x, rows: jax.nn.logsumexp(layer(x, rows)),
    "square_of_the_mean": lambda layer, x, rows: jnp.sum(layer(x, rows).mean(axis=0) ** 2),
    "running_totals": lambda layer, x, rows: jnp.mean(jnp.cumsum(layer(x, rows), axis=0) ** 2),
    "sorted": lambda layer, x, rows: jnp.mean(
        jnp.sort(layer(x, rows), axis=0) * draw(ROWS, 1, 1, seed=3)
    ),
    "written_elsewhere": lambda layer, x, rows: jnp.mean(
        jnp.zeros_like(x).at[PERMUTED].set(jnp.sin(layer(x, rows))) * draw(ROWS, 1, 1, seed=3)
    ),
    "column_written": lambda layer, x, rows: jnp.mean(
        layer(x.at[:, :, 0].set(jnp.sin(x[:, :, 1])), rows).at[:, 0].set(1.0) ** 2
    ),
    "time_first": lambda layer, x, rows: jnp.mean(
        layer(
            jnp.swapaxes(x, 0, 1).reshape(-1, FEATURES), jnp.swapaxes(rows, 0, 1).reshape(-1)
        ).reshape(x.shape[1], ROWS, -1)
        ** 4
    ),
    "wrong_order": lambda layer, x, rows: jnp.mean(through_two_orders(layer, x, rows) ** 2),
}


@pytest.mark.parametrize(("name", "positions"), crossed(SHARES, [ROWS, 2 * ROWS]))
def test_shares_of_rows_that_are_rearranged_or_mixed(name, positions):
    """Against a layer in which every row has parameters of its own, which move one by one."""
    params = {"w": draw(FEATURES, FEATURES), "b": draw(FEATURES)}
    direction = direction_like(params)
    x = draw(ROWS, positions, FEATURES, seed=1)
    rows = jnp.broadcast_to(jnp.arange(ROWS)[:, None], x.shape[:2])

    def loss_fn(params, x):
        def layer(x, _):
            return x @ params["w"] + jnp.broadcast_to(params["b"], x.shape)

        return SHARES[name](layer, x, rows)

    def moved(steps):
        w = params["w"][None] + steps["w"][:, None, None] * direction["w"][None]
        b = params["b"][None] + steps["b"][:, None] * direction["b"][None]

        def layer(x, rows):
            return jnp.einsum("...f,...fo->...o", x, w[rows]) + b[rows]

        return SHARES[name](layer, x, rows)

    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")
    result = jax.jit(lambda p, x, v: fn(p, x, direction=v))(params, x, direction)
    expected = jax.jit(jax.grad(moved))({"w": jnp.zeros(ROWS), "b": jnp.zeros(ROWS)})
    testing.assert_dots_close(result.dots, expected)


def test_a_missed_channel_shows_by_name(monkeypatch):
    def loss_fn(params, x):
        return jnp.mean(mean_squares(dense(params, x)))

    sums = Meeting.sums

    def without_biases(meeting, *args):
        found = sums(meeting, *args)
        return {k: 0 * dots if "['b']" in meeting.names[k] else dots for k, dots in found.items()}

    monkeypatch.setattr(Meeting, "sums", without_biases)
    direction = direction_like(DENSE)
    result = value_grad_and_dots(loss_fn)(DENSE, X, direction=direction)
    errors = conservation_error(result, direction)
    assert errors["w"] <= 1e-5
    assert errors["b"] >= 0.99


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"w": DENSE["w"]}, "direction must be a tree like the parameters"),
        ({**DENSE, "b": jnp.ones(3)}, r"\['b'\]: expected float32\[4\], found float32\[3\]"),
        ({**DENSE, "b": jnp.ones(4, jnp.bfloat16)}, r"found bfloat16\[4\]"),
    ],
)
def test_directions_that_do_not_fit(direction, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(dense(p, x)))
    with pytest.raises(ValueError, match=message):
        fn(DENSE, X, direction=direction)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"step": jnp.int32(1), "phase": jnp.ones(2, jnp.complex64)}, r"\['phase'\]: complex64\n"),
        ({"step": jnp.int32(1)}, r"real floating-point arrays. Found\n  \['step'\]: int32\n"),
        (jax.random.key(0), r"params: key<fry>\nPass other state .* as a further argument"),
    ],
)
def test_parameters_that_are_not_real_floats(params, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(x))
    with pytest.raises(TypeError, match=message):
        fn(params, X, direction=params)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X, "y": X[:5]}, r"share their leading size(.|\n)*\['y'\]: \(5, 5\)"),
        ({"x": X, "key": jnp.float32(1)}, r"\['key'\]: \(\)(.|\n)*as further arguments"),
        ({}, "batch has no arrays"),
        (X[:0], r"batch has no rows.*\(0, 5\)"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(dense(p, x)))
    with pytest.raises(ValueError, match=message):
        fn(DENSE, batch, direction=DENSE)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"argnums": 2}, TypeError, "argnums=2 and batch_argnums=1 must name positional arg"),
        ({"batch_argnums": (1, -3)}, TypeError, "of which there are 2.*by position, not by name"),
        ({"argnums": (0, -2)}, ValueError, "name an argument twice, of 2 positional"),
        ({"argnums": 1}, ValueError, "argnums=1 and batch_argnums=1 name an argument twice"),
    ],
)
def test_argnums_that_do_not_fit(numbers, error, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(dense(p, x)), **numbers)
    with pytest.raises(error, match=message):
        fn(DENSE, X, direction=DENSE)


def test_losses_that_are_not_scalars():
    fn = value_grad_and_dots(lambda p, x: mean_squares(dense(p, x)))
    with pytest.raises(ValueError, match=r"must return a scalar loss.*float32\[6\]"):
        fn(DENSE, X, direction=DENSE)


def test_a_missing_aux():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(dense(p, x)), has_aux=True)
    with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\). Found PyTreeDef\(\*\)"):
        fn(DENSE, X, direction=DENSE)


def test_loss_reduction_of_another_name():
    with pytest.raises(ValueError, match='must be "mean" or "sum", got \'max\''):
        value_grad_and_dots(lambda p, x: 0.0, loss_reduction="max")


def test_a_while_loop():
    def loss_fn(params, x):
        h = jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h * params["b"][None], x[:, :4])
        return jnp.mean(h)

    with pytest.raises(NotImplementedError, match=r"while at .*test_errors.py:\d+: a while loop"):
        value_grad_and_dots(loss_fn)(DENSE, X, direction=DENSE)


def test_what_cannot_be_walked_is_refused():
    def loss_fn(params, x):
        scaled = jax.lax.composite(lambda x, scale: x * scale, "test.scaled")
        return jnp.mean(scaled(x[:, :4], params["b"][None]))

    with pytest.raises(NotImplementedError, match=r"composite.*\['b'\].*cannot be walked"):
        value_grad_and_dots(loss_fn)(DENSE, X, direction=DENSE)
