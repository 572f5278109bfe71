"""Linear solves, factorisations, differential equations and loops that rows end."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint
from jax.scipy import linalg, sparse, stats

from tests.dots.checks import FEATURES, ROWS, check, draw

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


@pytest.mark.parametrize("name", CASES)
def test_solvers(name):
    check(*CASES[name])
