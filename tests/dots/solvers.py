"""Losses with linear solves, factorisations, differential equations and loops that rows end."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.ode import odeint
from jax.scipy import linalg, sparse, stats

from models.arrays import FEATURES, ROWS, draw

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
