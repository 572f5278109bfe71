"""Linear solves, factorisations, differential equations and loops that rows end."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint
from jax.scipy import sparse

from ghostjax import testing, value_grad_and_dots
from ghostjax._errors import RowAxisError
from models.arrays import direction_like
from tests.dots.checks import check, check_late, expected_dots
from tests.dots.solvers import CASES, SQUARE, X, field
from tests.variants import some_quick

SLOW = [
    "bicgstab",
    "cho_solve_rows_as_columns",
    "cholesky_of_matrices_of_rows",
    "conjugate_gradients",
    "factorisations",
    "gmres",
    "inverse_and_determinant",
    "least_squares",
    "multivariate_normal_by_row",
    "odeint_by_row",
    "root_by_row",
    "solve_with_a_matrix_of_each_row",
]
# Like others, which are quick.
ALIKE = [
    "loop_that_rows_end",
    "logarithms_and_polynomials",
    "reduce_by_product",
    "reduce_by_sum",
    "searchsorted",
    "solve_rows_as_columns",
    "triangular_solve_by_row",
    "triangular_solve_rows_as_columns",
]
NAMES = some_quick(CASES, lambda name: name not in (*SLOW, *ALIKE))
LATE = ["solve_by_row", "multivariate_normal", "rows_solved_together", "loop_that_rows_end"]


@pytest.mark.quick(
    "triangular_solve_from_the_right",
    "custom_vmap",
    "tridiagonal_solve_by_row",
    "reduce_by_own",
    "rows_solved_together",
    "loop_that_moved_rows_end",
)
@pytest.mark.parametrize("name", NAMES)
def test_solvers(name):
    check(*CASES[name])


@pytest.mark.quick("loop_that_rows_end")
@pytest.mark.parametrize("name", [*LATE, *SLOW])
def test_late_directions(name):
    check_late(*CASES[name])


def refusal(losses):
    with pytest.raises(RowAxisError) as error:
        value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))(SQUARE, X, direction=SQUARE)
    return str(error.value)


@pytest.mark.parametrize("move", [lambda x: x, lambda x: x[::-1]], ids=["in_place", "moved"])
def test_a_matrix_that_mixes_rows(move):
    def losses(params, x):
        def multiplied(rows):
            return rows + params["b"][None] ** 2 * jnp.mean(rows, axis=0, keepdims=True)

        return jnp.sum(move(sparse.linalg.cg(multiplied, move(x))[0]) ** 2, axis=1)

    assert "combines rows with a value in which rows are mixed" in refusal(losses)


def test_a_matrix_that_moves_rows():
    def losses(params, x):
        h = x * params["b"][None]
        solved = lax.custom_linear_solve(
            lambda rows: rows[::-1], h, lambda _, rows: rows, symmetric=True
        )
        return jnp.sum((solved * params["b"][None]) ** 2, axis=1)

    assert "custom_linear_solve" in refusal(losses)
    assert "its matrix moves Rows(axis=0" in refusal(losses)


def one_solution(params, row):
    times = jnp.array([0.0, 1.0])
    return jnp.sum(odeint(field, row, times, params["w"], params["b"])[-1] ** 2)


def test_steps_that_all_rows_choose():
    """``odeint`` of all rows at once; its way out is the next test."""

    def losses(params, x):
        times = jnp.array([0.0, 1.0])

        def whole(y, t, w, b):
            return field(y, t, w, b[None])

        return jnp.sum(odeint(whole, x, times, params["w"], params["b"])[-1] ** 2, axis=1)

    message = refusal(losses)
    assert "rows are mixed" in message
    assert "pass per_example=True" in message


@pytest.mark.slow
def test_steps_that_each_row_chooses():
    direction = direction_like(SQUARE)
    fn = value_grad_and_dots(one_solution, per_example=True)
    result = jax.jit(lambda p, x, v: fn(p, x, direction=v))(SQUARE, X, direction)
    expected = expected_dots(jax.vmap(one_solution, (None, 0)), SQUARE, X, direction)
    testing.assert_dots_close(result.dots, expected, rtol=1e-5)


def test_custom_vmap_of_one_row():
    """As it has no reverse mode but under ``vmap``."""

    @jax.custom_batching.custom_vmap
    def scaled(row, b):
        return row * b

    @scaled.def_vmap
    def rule(size, are_batched, row, b):
        if any(are_batched):
            row, b = (v if batched else v[None] for v, batched in zip((row, b), are_batched))
        return row * b, any(are_batched)

    def one(params, row):
        return jnp.sum(scaled(row, params["b"]) ** 2)

    direction = direction_like(SQUARE)
    fn = jax.jit(value_grad_and_dots(one, per_example=True))
    result = fn(SQUARE, X, direction=direction)
    expected = expected_dots(
        lambda p, x: jnp.sum((x * p["b"][None]) ** 2, axis=1), SQUARE, X, direction
    )
    testing.assert_dots_close(result.dots, expected, rtol=1e-5)
