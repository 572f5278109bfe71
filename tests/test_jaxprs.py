"""What is read from jaxprs."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax._jaxprs import scan_counts

X = jnp.ones((3, 4))


def one_of_each(constant, carry, xs):
    def body(carry, x):
        return (carry[0] * x + constant, carry[1] + 1), (x, carry[0])

    return jax.lax.scan(body, (carry, 0), xs)


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (one_of_each, (X[0], X[0], X), (1, 2)),
        (lambda xs: jax.lax.scan(lambda _, x: (None, jnp.sin(x)), None, xs), (X,), (0, 0)),
        (lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, length=3), (X,), (0, 1)),
        (lambda x: jax.lax.scan(lambda _, k: (None, x), None, length=3), (X,), (1, 0)),
        (jax.vmap(one_of_each, (None, 0, None)), (X[0], X, X), (1, 2)),
    ],
)
def test_scan_counts(function, args, expected):
    [eqn] = [eqn for eqn in jax.make_jaxpr(function)(*args).eqns if eqn.primitive.name == "scan"]
    assert scan_counts(eqn) == expected
