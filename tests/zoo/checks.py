"""A package's own loss function, against gradients of batches that hold one example each."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import conservation_error, testing, value_grad_and_dots

MARKS = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def package(name):
    """The package, or a skip: not every one can be installed everywhere."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def redrawn(params, scale=0.2):
    """Random values added, as zeros and ones hide terms."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), params
    )


def direction_like(params):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def rows_apart(batch):
    rows = jax.tree.leaves(batch)[0].shape[0]
    return [jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch) for row in range(rows)]


def check(loss_fn, params, batch, apart, weights, direction=None, **labels):
    """``loss_fn`` is the mean of the losses of ``apart``, with ``weights``.

    Dots in one jit, with loss_reduction "sum": every example's share of <grads, direction>.
    """
    direction = direction_like(params) if direction is None else direction
    fn = value_grad_and_dots(loss_fn, loss_reduction="sum")
    run = jax.jit(lambda params, batch, v, labels: fn(params, batch, direction=v, **labels | count))
    count = {"num_labels": labels.pop("num_labels")} if labels else {}
    plain, (trace_plain, compile_plain) = _timed(
        jax.jit(jax.value_and_grad(loss_fn)), params, batch
    )
    result, (trace_dots, compile_dots) = _timed(run, params, batch, direction, labels)
    print(f"\ntracing {trace_dots / trace_plain:.1f}, compiling {compile_dots / compile_plain:.1f}")

    testing.assert_dots_close((result.value, result.grads), plain, rtol=1e-5)
    grad = jax.jit(jax.grad(loss_fn))
    found = []
    for own, weight in zip(apart, np.asarray(weights, np.float64) / np.sum(weights), strict=True):
        found.append(
            jax.tree.map(
                lambda leaf, v, weight=weight: (
                    weight * np.vdot(np.asarray(leaf, np.float64), np.asarray(v, np.float64))
                ),
                grad(params, own),
                direction,
            )
        )
    expected = jax.tree.map(lambda *dots: np.stack(dots), *found)
    testing.assert_dots_close(result.dots, expected, rtol=1e-5)
    assert int(result.conflicts) == 0
    error = max(map(float, jax.tree.leaves(conservation_error(result, direction))))
    print(f"conservation_error {error:.1e}, largest error of dots {_error(result, expected):.1e}")
    assert error <= 1e-5
    return result


def _timed(fn, *args):
    start = time.perf_counter()
    lowered = fn.lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return compiled(*args), (middle - start, time.perf_counter() - middle)


def _error(result, expected):
    pairs = zip(jax.tree.leaves(result.dots), jax.tree.leaves(expected))
    return max(np.linalg.norm(found - dots) / np.linalg.norm(dots) for found, dots in pairs)
