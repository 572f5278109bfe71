"""Backward rules that use statistics of the batch: of data they are constants, but nothing that
gradient flows through may be mixed of several rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import value_grad_and_dots
from ghostjax._errors import RowAxisError
from models.arrays import draw
from tests.norms.checks import Rows, check_all, mean_of

B, T, D, F, V = 4, 3, 5, 6, 2
P = {"w": draw(D, F, seed=1), "head": draw(F, V, seed=2)}
BATCH = {
    "x": draw(B, T, D, seed=3),
    "mask": jnp.asarray(np.random.default_rng(4).integers(0, 2, (B, T)), jnp.float32),
}


def product_with(backward):
    @jax.custom_vjp
    def product(h, head, mask):
        return (h @ head) * mask[..., None]

    def rule(kept, c):
        h, head, mask = kept
        return *backward(h, head, mask, c * mask[..., None]), jnp.zeros_like(mask)

    product.defvjp(lambda *args: (product(*args), args), rule)
    return product


def losses_with(product):
    def losses(p, batch):
        outputs = product(jnp.tanh(batch["x"] @ p["w"]), p["head"], batch["mask"])
        return jnp.sum(jnp.square(outputs), (1, 2))

    return losses


def gradients(h, head, c):
    return c @ head.T, jnp.einsum("btf,btv->fv", h, c)


@pytest.mark.parametrize("shares_first", [False, True])
def test_how_many_count(shares_first):
    """Norms and clipped gradients counted ones in place of other rows' masks."""

    def by_count(h, head, mask, c):
        if shares_first:  # the cotangent has its mask already, of zeros and ones
            return gradients(h, head, c * (mask / jnp.sum(mask))[..., None])
        return gradients(h, head, c / jnp.sum(mask))

    count = jnp.sum(BATCH["mask"])
    one = product_with(lambda h, head, mask, c: gradients(h, head, c / count))
    rows = Rows.of(losses_with(one), P, BATCH)
    check_all(mean_of(losses_with(product_with(by_count))), rows, P, BATCH)


def with_scan(h, head, mask, c):
    def body(total, given):
        h, c = given
        return total + jnp.outer(jnp.sum(h, 0), jnp.sum(c, 0)), None

    return c @ head.T, jax.lax.scan(
        body, jnp.zeros_like(head), (h.swapaxes(0, 1), c.swapaxes(0, 1))
    )[0]


MIXING = {
    "sums": lambda h, head, mask, c: (
        c @ head.T,
        jnp.outer(jnp.sum(h, (0, 1)), jnp.sum(c, (0, 1))),
    ),
    "a factor": lambda h, head, mask, c: (c @ head.T, gradients(h, head, c)[1] / jnp.max(h)),
    "a factor of rows": lambda h, head, mask, c: (
        c @ head.T * jnp.mean(h),
        gradients(h, head, c)[1],
    ),
    "in a scan over positions": with_scan,
}


@pytest.mark.parametrize("name", MIXING)
def test_statistics_of_activations_are_refused(name):
    """Their dots held the statistics fixed, and norms were those of neither."""
    loss_fn = mean_of(losses_with(product_with(MIXING[name])))
    with pytest.raises(RowAxisError, match="a value in which rows are mixed"):
        jax.eval_shape(value_grad_and_dots(loss_fn), P, BATCH, direction=P)
