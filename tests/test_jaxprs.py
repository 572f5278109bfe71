"""What is read from jaxprs."""

import re

import jax
import jax.numpy as jnp
import pytest

from ghostjax._jaxprs import describe_operation, inner_jaxprs, scan_counts

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


def test_operations_are_described_by_the_line_that_asks_for_them():
    def normalized(x):
        return jnp.where(x > 0, x, 0.0)

    eqns = jax.make_jaxpr(lambda x: jax.jit(normalized)(x))(X).jaxpr.eqns
    [outer] = eqns
    ((body, _),) = inner_jaxprs(outer)
    where = body.eqns[-1]
    ((inside, _),) = inner_jaxprs(where)
    here = re.escape(__file__) + r":\d+"
    assert re.fullmatch(f"normalized at {here}", describe_operation(outer))
    assert re.fullmatch(f"gt at {here}", describe_operation(body.eqns[0]))
    # JAX's own jitted function: its operations have no line of ours.
    last = inside.eqns[-1]
    assert describe_operation(last) == "select_n"
    assert re.fullmatch(f"select_n in _where at {here}", describe_operation(last, (where, outer)))
