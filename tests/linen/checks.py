"""Per-row autodiff beside the engine, for every test of this folder."""

import jax
import numpy as np

from ghostjax import GradDotProdEngine, testing

V = 3


def check(loss_fn, params, batch, *args, val_rows=V, reduction="mean", **kwargs):
    """Dots, gradient and both values of the engine, which is returned with its result."""
    engine = GradDotProdEngine(loss_fn, val_batch_size=val_rows, loss_reduction=reduction)
    result = engine(params, batch, *args, **kwargs)

    @jax.jit
    def by_row(params):
        def losses(params):
            return loss_fn(params, batch, *args, **kwargs)

        return losses(params), jax.jacrev(losses)(params)

    losses, rows = by_row(params)
    train, val = np.split(np.asarray(losses, np.float64), [-val_rows])
    reduce = {"mean": np.mean, "sum": np.sum}[reduction]
    np.testing.assert_allclose(result.value, reduce(train), rtol=1e-5)
    np.testing.assert_allclose(result.val_value, val.mean(), rtol=1e-5)
    rows = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), rows)
    testing.assert_dots_close(
        result.grads, jax.tree.map(lambda leaf: reduce(leaf[:-val_rows], axis=0), rows)
    )

    def dots(rows):
        rows = rows.reshape(len(losses), -1)
        return rows[:-val_rows] @ rows[-val_rows:].mean(0)

    testing.assert_dots_close(result.dots, jax.tree.map(dots, rows))
    return engine, result
