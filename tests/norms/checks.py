"""Per-row autodiff beside norms, clipped gradients, pairs and cosines."""

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax import (
    pairwise_dots,
    squared_norms,
    testing,
    value_and_clipped_grad,
    value_grad_and_dots,
)
from models.arrays import direction_like


class Rows:
    """What rows' gradients, in float64 a tree of [B, *p], give when they are written out."""

    def __init__(self, gradients):
        self.gradients = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradients)
        self.count = jax.tree.leaves(self.gradients)[0].shape[0]

    @classmethod
    def of(cls, row_losses, params, batch):
        return cls(testing.per_example_grads(row_losses, params, batch))

    def _flat(self, function):
        return jax.tree.map(lambda leaf: function(leaf.reshape(self.count, -1)), self.gradients)

    def squares(self):
        return self._flat(lambda rows: np.sum(np.square(rows), axis=1))

    def gram(self):
        return self._flat(lambda rows: rows @ rows.T)

    def norms(self):
        return np.sqrt(sum(jax.tree.leaves(self.squares())))

    def dots(self, direction):
        return jax.tree.map(
            lambda rows, vector: np.tensordot(rows, np.asarray(vector, np.float64), vector.ndim),
            self.gradients,
            direction,
        )

    def clipped_sum(self, max_norm, weights=None):
        norms = self.norms()
        own = np.minimum(1, max_norm / np.where(norms > 0, norms, max_norm))
        weights = own if weights is None else own * np.asarray(weights, np.float64)
        return jax.tree.map(lambda rows: np.tensordot(weights, rows, 1), self.gradients)

    def added_up(self, labels, count):
        """The gradients of examples, of which row i belongs to number ``labels[i]``."""
        which = np.arange(count)[:, None] == np.asarray(labels)[None]
        return Rows(jax.tree.map(lambda rows: np.tensordot(which, rows, 1), self.gradients))


def check_all(loss_fn, rows: Rows, params, batch, *, rtol=1e-5, labels=None, **options):
    """All of them of one loss function, in one program.

    ``rows``: of the examples; ``labels``: ``labels`` and ``num_labels``.
    """
    direction, given = direction_like(params), labels or {}
    # Of a clipped gradient, some rows shall be clipped and some not.
    max_norm = float(np.median(rows.norms()))
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    scale = 1 / num_rows if options.get("loss_reduction", "mean") == "mean" else 1

    def run(params, batch, direction):
        fn = value_grad_and_dots(loss_fn, norms=True, **options)
        result = fn(params, batch, direction=direction, **given)
        return (
            squared_norms(loss_fn, **options)(params, batch, **given),
            pairwise_dots(loss_fn, **options)(params, batch, **given),
            value_and_clipped_grad(loss_fn, max_norm, **options)(params, batch, **given),
            (result.squared_norms, result.dots, result.cosine(direction), result.value),
        )

    norms, gram, (value, clipped), (beside, dots, cosine, plain) = jax.jit(run)(
        params, batch, direction
    )
    testing.assert_dots_close(norms, rows.squares(), rtol=rtol)
    testing.assert_dots_close(beside, rows.squares(), rtol=rtol)
    testing.assert_dots_close(gram, rows.gram(), rtol=rtol)
    testing.assert_dots_close(dots, rows.dots(direction), rtol=rtol)
    expected = jax.tree.map(lambda leaf: leaf * scale, rows.clipped_sum(max_norm))
    testing.assert_dots_close(clipped, expected, rtol=rtol)
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(direction)))
    expected = sum(jax.tree.leaves(rows.dots(direction))) / (rows.norms() * size)
    np.testing.assert_allclose(cosine, expected, rtol=0, atol=rtol)
    np.testing.assert_allclose(value, plain, rtol=1e-6)


def mean_of(row_losses):
    return lambda params, batch: jnp.mean(row_losses(params, batch))


def sum_of(row_losses):
    return lambda params, batch: jnp.sum(row_losses(params, batch))
