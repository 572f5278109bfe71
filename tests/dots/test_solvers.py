"""Linear solves, factorisations, differential equations and loops that rows end."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint
from jax.scipy import linalg, sparse, stats

from ghostjax import testing, value_grad_and_dots
from ghostjax._errors import RowAxisError
from tests.dots.checks import (
    FEATURES,
    ROWS,
    check,
    check_late,
    direction_like,
    draw,
    expected_dots,
)

CASES = {}
X = draw(ROWS, FEATURES, seed=1)
SQUARE = {"w": 0.3 * draw(FEATURES, FEATURES), "b": draw(FEATURES, seed=2)}


def case(losses):
    CASES[losses.__name__] = losses, SQUARE, X
    return losses


def matrix(params):
    return params["w"] @ params["w"].T + jnp.eye(FEATURES)


def factor(params):
    return jnp.tril(params["w"]) + 2 * jnp.eye(FEATURES)


@case
def solve_by_row(params, x):
    solved = jax.vmap(lambda row: jnp.linalg.solve(matrix(params), row))(x)
    return jnp.sum(x * jnp.sin(solved), axis=1)


@case
def solve_rows_as_columns(params, x):
    return jnp.sum(x.T * jnp.linalg.solve(matrix(params), x.T), axis=0)


@case
def solve_with_a_matrix_of_each_row(params, x):
    def one(row):
        return jnp.linalg.solve(matrix(params) + jnp.outer(row, row), params["b"] + row)

    return jnp.sum(jnp.sin(jax.vmap(one)(x)), axis=1)


@case
def solve_with_a_batch_of_matrices(params, x):
    matrices = jnp.eye(FEATURES)[None] + x[:, :, None] * x[:, None, :]
    solved = jnp.linalg.solve(matrices, jnp.broadcast_to(params["b"], x.shape)[..., None])
    return jnp.sum(jnp.sin(solved), axis=(1, 2))


@case
def inverse_and_determinant(params, x):
    def one(row):
        own = matrix(params) + jnp.outer(row, row)
        return jnp.sum(jnp.linalg.inv(own)) + jnp.linalg.slogdet(own)[1] + jnp.linalg.det(own)

    return jax.vmap(one)(x)


@case
def conjugate_gradients(params, x):
    def one(row):
        return row @ sparse.linalg.cg(lambda v: matrix(params) @ v, row, tol=1e-6)[0]

    return jax.vmap(one)(x)


@case
def gmres(params, x):
    def one(row):
        return row @ sparse.linalg.gmres(lambda v: matrix(params) @ v, row)[0]

    return jax.vmap(one)(x)


@case
def bicgstab(params, x):
    def one(row):
        return row @ sparse.linalg.bicgstab(lambda v: matrix(params) @ v, row, tol=1e-6)[0]

    return jax.vmap(one)(x)


@case
def conjugate_gradients_after_a_layer(params, x):
    def one(row):
        row = jnp.tanh(row @ params["w"])
        solved, _ = sparse.linalg.cg(lambda v: v + row * (row @ v) + params["b"] ** 2 * v, row)
        return jnp.sum(jnp.sin(solved))

    return jax.vmap(one)(x)


@case
def triangular_solve_rows_as_columns(params, x):
    solved = linalg.solve_triangular(factor(params), x.T, lower=True)
    return jnp.sum(jnp.sin(solved), axis=0)


@case
def triangular_solve_from_the_right(params, x):
    solved = lax.linalg.triangular_solve(
        factor(params), x, left_side=False, lower=True, transpose_a=True
    )
    return jnp.sum(jnp.sin(solved), axis=1)


@case
def triangular_solve_by_row(params, x):
    def one(row):
        own = factor(params) + jnp.diag(row**2)
        return linalg.solve_triangular(own, row + params["b"], lower=True, trans=1)

    return jnp.sum(jnp.sin(jax.vmap(one)(x)), axis=1)


@case
def cho_solve_rows_as_columns(params, x):
    root = linalg.cho_factor(matrix(params))
    return jnp.sum(x.T * linalg.cho_solve(root, x.T), axis=0)


@case
def multivariate_normal(params, x):
    with jax.numpy_rank_promotion("allow"):
        return -stats.multivariate_normal.logpdf(x, params["b"], matrix(params))


@case
def multivariate_normal_by_row(params, x):
    return -jax.vmap(
        lambda row: stats.multivariate_normal.logpdf(row, params["b"], matrix(params))
    )(x)


@case
def cholesky_of_matrices_of_rows(params, x):
    root = jnp.linalg.cholesky(matrix(params)[None] + x[:, :, None] * x[:, None, :])
    solved = linalg.solve_triangular(root, (x + params["b"][None])[..., None], lower=True)
    return jnp.sum(jnp.sin(solved), axis=(1, 2)) + jnp.sum(jnp.log(jnp.abs(root[:, 0])), axis=1)


@case
def writes_to_columns(params, x):
    scale = params["b"][0]
    x = x.at[:, 1].add(scale).at[:, 2].multiply(scale).at[:, 0].max(scale).at[:, 3].min(scale)
    return jnp.sum(x**2, axis=1)


@case
def reduce_by_sum(params, x):
    return lax.reduce(x * params["b"][None], 0.0, lax.add, (1,)) ** 2


@case
def reduce_by_product(params, x):
    return lax.reduce(x * params["b"][None], 1.0, lax.mul, (1,)) ** 2


@case
def reduce_by_own(params, x):
    return lax.reduce(x * params["b"][None], 0.0, lambda a, b: a + b + 0.1 * a * b, (1,))


@case
def custom_vmap(params, x):
    @jax.custom_batching.custom_vmap
    def scaled(a, b):
        return a * b

    @scaled.def_vmap
    def rule(size, are_batched, a, b):
        return a * (b if b.ndim == a.ndim else b[None]), True

    return jnp.sum(jax.vmap(scaled, in_axes=(0, None))(x, params["b"]) ** 2, axis=1)


def field(y, t, w, b):
    return jnp.tanh(y @ w) + jnp.sin(t) * b


@case
def odeint_by_row(params, x):
    def one(row):
        times = jnp.array([0.0, 0.5, 1.0])
        return jnp.sum(odeint(field, row, times, params["w"], params["b"])[1:] ** 2)

    return jax.vmap(one)(x)


@case
def interpolation(params, x):
    points = jnp.array([-1.0, -0.5, 0.0, 1.0, 2.0])
    return jnp.sum(jnp.interp(x, points, params["b"]), axis=1) ** 2


@case
def searchsorted(params, x):
    found = jnp.searchsorted(jnp.sort(params["b"]), x)
    return jnp.sum(params["w"][0][jnp.clip(found, 0, 2)] * x, axis=1) ** 2


@case
def logarithms_and_polynomials(params, x):
    y = jnp.log2(jnp.abs(x * params["b"][None]) + 1.0) + jnp.polyval(
        params["b"][:, None, None], 0.5 * x
    )
    return jnp.sum(y + jnp.tanh(x * params["b"][None]), axis=1)


@case
def rows_solved_together(params, x):
    """The steps of the solver are those of all rows; what it solves keeps rows apart."""
    return jnp.sum(x * sparse.linalg.cg(lambda rows: rows @ matrix(params), x, tol=1e-7)[0], axis=1)


@case
def solve_of_own(params, x):
    inverse = lax.stop_gradient(jnp.linalg.inv(matrix(params)))
    solved = lax.custom_linear_solve(
        lambda rows: rows @ matrix(params), x, lambda _, rows: rows @ inverse, symmetric=True
    )
    return jnp.sum(jnp.sin(solved), axis=1)


@case
def tridiagonal_solve_by_row(params, x):
    beside = jnp.ones(FEATURES).at[0].set(0)

    def one(row):
        diagonal = params["b"] ** 2 + 3
        return lax.linalg.tridiagonal_solve(beside, diagonal, beside[::-1], row[:, None])

    return jnp.sum(jax.vmap(one)(x) ** 2, axis=(1, 2))


@case
def solve_of_moved_rows(params, x):
    solved = jax.vmap(lambda row: jnp.linalg.solve(matrix(params), row))(x[::-1])
    return jnp.sum(solved**3, axis=1)[::-1]


@case
def loop_that_rows_end(params, x):
    h = x @ params["w"]

    def shrunk(rows):
        return lax.while_loop(lambda rows: jnp.max(rows) > 0.1, lambda rows: 0.7 * rows, rows)

    every = shrunk(lax.stop_gradient(h))
    each = jax.vmap(shrunk)(lax.stop_gradient(h))
    return jnp.sum((h + every) * jnp.sin(each * params["b"][None]), axis=1)


@case
def loop_that_moved_rows_end(params, x):
    order = jnp.argsort(x[:, 0])
    h = x[order]
    small = jax.vmap(
        lambda row: lax.while_loop(lambda row: jnp.sum(row**2) > 0.1, lambda row: 0.7 * row, row)
    )(lax.stop_gradient(h))
    return jnp.sum(((small + h) * params["b"][None]) ** 2, axis=1)[jnp.argsort(order)]


@case
def factorisations(params, x):
    def one(row):
        own = matrix(params) + jnp.outer(row, row) + jnp.diag(jnp.arange(float(FEATURES)))
        values, vectors = jnp.linalg.eigh(own)
        q, r = jnp.linalg.qr(own)
        return jnp.sum(jnp.sin(values)) + jnp.sum(vectors**4) + jnp.sum(jnp.sin(q)) + jnp.sum(r)

    return jax.vmap(one)(x)


@case
def least_squares(params, x):
    def one(row):
        own = matrix(params) + jnp.outer(row, row)
        return jnp.sum(jnp.linalg.lstsq(own, row)[0] ** 2) + jnp.sum(jnp.linalg.pinv(own[:, :3]))

    return jax.vmap(one)(x)


@case
def root_by_row(params, x):
    def one(row):
        def residual(z):
            return z - 0.3 * jnp.tanh(params["w"] @ z) - row

        def solve(residual, z):
            return lax.fori_loop(0, 60, lambda _, z: z - residual(z), z)

        def tangent(linear, y):
            return jnp.linalg.solve(jax.jacobian(linear)(y), y)

        return jnp.sum(lax.custom_root(residual, jnp.zeros_like(row), solve, tangent) ** 2)

    return jax.vmap(one)(x)


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
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
LATE = ["solve_by_row", "multivariate_normal", "rows_solved_together", "loop_that_rows_end"]


@pytest.mark.parametrize("name", NAMES)
def test_solvers(name):
    check(*CASES[name])


@pytest.mark.parametrize(
    "name", [*LATE, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
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
    result = value_grad_and_dots(one, per_example=True)(SQUARE, X, direction=direction)
    expected = expected_dots(
        lambda p, x: jnp.sum((x * p["b"][None]) ** 2, axis=1), SQUARE, X, direction
    )
    testing.assert_dots_close(result.dots, expected, rtol=1e-5)
