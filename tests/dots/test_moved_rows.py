"""Rows that do not stay in place: loops over rows, chunks, shuffles, look-ups, padding."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from models.moved import (
    CASES,
    PARAMS,
    B,
    H,
    T,
    X,
    hidden,
    places,
    rows,
    started_and_dropped,
    started_by_parameters,
)
from tests.dots.checks import check_loss, expected_dots
from tests.variants import some_quick

# Of those that move rows alike, one where time matters.
QUICK = {
    "micro_batches", "map", "sorted_tokens", "written", "padded", "rolled_in_a_carry", "recurrent",
    "started_by_parameters", "summed_so_far", "time_first_cut_across",
    "with_a_token_of_parameters", "experts",
}  # fmt: skip


@pytest.mark.quick(
    "padded",
    "summed_so_far",
    "with_a_token_of_parameters",
    "written",
    "rolled_in_a_carry",
    "time_first_cut_across",
)
@pytest.mark.parametrize("name", some_quick(CASES, QUICK))
def test_moved_rows(name):
    loss_fn, row_losses = CASES[name]
    # XLA fuses the sum over the experts' weights in another way.
    check_loss(loss_fn, row_losses, PARAMS, X, exact_gradient=name != "experts")


def mixed_by_data(p, x):
    h = hidden(p, x)
    return jnp.mean(jnp.square((h + h[jnp.argsort(x[:, 0, 0])]) @ p["v"]))


def added_up_by_data(p, x):
    h = hidden(p, x)
    return jnp.mean(jnp.square(jnp.zeros_like(h).at[places(x)].add(h) @ p["v"]))


def mixed_in_a_loop(p, x):
    order = jnp.argsort(x[:, 0, 0])

    def body(h, _):
        return h + h[order], None

    return jnp.mean(jnp.square(jax.lax.scan(body, hidden(p, x), None, length=2)[0] @ p["v"]))


def padding_that_is_added_to_rows(p, x):
    """What parameters make of padding is no row's, until it is added to one."""
    h = hidden(p, jnp.pad(x[jnp.argsort(x[:, 0, 0])], ((0, B), (0, 0), (0, 0))))
    return jnp.mean(jnp.square((h[:B] + h[B:]) @ p["v"]))


@pytest.mark.parametrize(
    "loss_fn",
    [
        padding_that_is_added_to_rows,
        mixed_by_data,
        added_up_by_data,
        mixed_in_a_loop,
        lambda p, x: jnp.mean(rows(p, x[jnp.argsort(x[:, 0, 0])] * x)),
        lambda p, x: jnp.mean(rows(p, jnp.zeros_like(x).at[jnp.zeros(B, int)].add(x))),
        lambda p, x: jnp.mean(started_by_parameters(p, x, jnp.argsort(x[:, 0, 0]))),
    ],
)
def test_rows_that_data_mix_have_no_dots(loss_fn):
    """Which only shows when it runs: NaN, and a count."""

    @jax.jit
    def run(params, x):
        result = value_grad_and_dots(loss_fn)(params, x, direction=params)
        late = value_and_dots_fn(loss_fn)(params, x)[2].result(params)
        return result, late, jax.grad(loss_fn)(params, x)

    result, late, grads = run(PARAMS, X)
    assert int(result.conflicts) == int(late.conflicts) > 0
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves((result.dots, late.dots)))
    for leaf, own in zip(jax.tree.leaves(grads), jax.tree.leaves(result.grads)):
        assert (leaf == own).all()


@pytest.mark.quick("inputs", "outputs", "parameters_among_rows")
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, x: jnp.mean(hidden(p, x) + hidden(p, x)[::-1]), "add at .*other rows"),
        (lambda p, x: jnp.mean(rows(p, x + x[::-1])), r"\['w'\] meets data .*different places"),
        (
            lambda p, x: jnp.mean(rows(p, jax.lax.associative_scan(jnp.add, x))),
            r"\['w'\] meets data .*joined with a value in which rows are mixed",
        ),
        (
            lambda p, x: jnp.mean(rows(p, jnp.concatenate([p["v"][None, :, :], x[:, :H]]))),
            r"\['v'\] meets data in concatenate at .*joins along the row axis",
        ),
        (started_and_dropped, r"\['b'\] meets data in scan at .*rows are moved there"),
    ],
    ids=["outputs", "inputs", "running_sums", "parameters_among_rows", "start_of_a_loop"],
)
def test_rows_that_are_known_to_mix_are_an_error(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(loss_fn)(PARAMS, X, direction=PARAMS)


def test_places_that_nothing_is_written_to_belong_to_nobody():
    """Of a carry that starts as a constant."""

    def loss_fn(p, x):
        def body(h, each):
            k, row = each
            return h.at[k].set(hidden(p, row)), None

        h = jax.lax.scan(body, jnp.zeros((B + 2, T, H)), (jnp.arange(B) + 1, x))[0]
        return jnp.sum(jnp.tanh(h @ p["v"] + p["v"][:1][None]))

    def row_losses(p, x):
        return jnp.sum(jnp.tanh(hidden(p, x) @ p["v"] + p["v"][:1][None]), axis=(1, 2))

    fn = jax.jit(value_grad_and_dots(loss_fn, loss_reduction="sum"))
    result = fn(PARAMS, X, direction=PARAMS)
    testing.assert_dots_close(result.dots, expected_dots(row_losses, PARAMS, X, PARAMS))
    nobody = 2 * T * jnp.sum((1 - jnp.tanh(PARAMS["v"][0]) ** 2) * PARAMS["v"][0])
    testing.assert_dots_close(result.shared["v"], nobody)
    assert int(result.conflicts) == 0
