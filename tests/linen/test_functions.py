"""The engine takes any JAX function: bare ones, and those of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import GradDotProdEngine, testing
from models import functions
from models.flax import MODELS
from models.layers import LAYERS
from models.libraries import LIBRARIES
from tests.linen.checks import check
from tests.linen.functions import FUNCTIONS, P, W, X, dense, draw, means
from tests.variants import some_quick


@pytest.mark.parametrize("name", some_quick(FUNCTIONS, lambda name: not FUNCTIONS[name][1]))
def test_functions(name):
    check(*FUNCTIONS[name][0])


@pytest.mark.parametrize("name", some_quick(functions.FUNCTIONS, ["einsum_of_three"]))
def test_functions_of_value_grad_and_dots(name):
    check(*functions.FUNCTIONS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries(name, standard_promotion):
    with jax.numpy_rank_promotion("allow"):
        check(*LIBRARIES[name]())


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_value_grad_and_dots(name, standard_promotion):
    check(*LAYERS[name]())


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", MODELS)
def test_models_of_value_grad_and_dots(name, standard_promotion):
    check(*MODELS[name]())


@pytest.mark.parametrize(
    ("rows", "val_rows"), [(2, 1), (4, 3), (7, 1), (7, 6)], ids=lambda number: str(number)
)
def test_few_rows(rows, val_rows):
    def loss_fn(params, x):
        return means(dense(params, x) @ params["w"].T)

    check(loss_fn, P, X[:rows], val_rows=val_rows)


def test_sum_of_losses():
    check(lambda p, x: means(dense(p, x)), P, X, reduction="sum")


@pytest.mark.slow
def test_low_precision_of_parameters():
    """Dots are float32 and no worse than bfloat16 autodiff, against that of float32."""
    params = {"w": W, "b": P["b"], "s": draw(3, seed=4)}
    x = draw(7, 5, 4, seed=5)

    def loss_fn(params, x):
        h = x.astype(params["w"].dtype) @ params["w"] + params["b"][None, None]
        return means(jnp.tanh(h * params["s"][None, None]).astype(jnp.float32))

    for dtype, rtol in ((jnp.float16, 1e-3), (jnp.bfloat16, 1e-2)):
        narrow = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
        result = GradDotProdEngine(loss_fn, val_batch_size=3)(narrow, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype(jnp.float32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(result.grads)} == {jnp.dtype(dtype)}
        found = testing.per_example_dots(loss_fn, narrow, x, 3)
        best = testing.per_example_dots(loss_fn, wide, x, 3)
        testing.assert_dots_close(result.dots, found, rtol=rtol)
        errors, rounding = (testing.relative_errors(dots, best) for dots in (result.dots, found))
        assert max(errors.values()) <= max(rounding.values())


@pytest.mark.slow
@pytest.mark.parametrize("uses", [1, 2])
def test_dots_are_as_wide_as_their_parameters(uses):
    """Whatever width they are used in."""

    def loss_fn(params, x):
        scale = params["s"].astype(x.dtype)[None]
        for _ in range(uses):
            x = jnp.tanh(x @ params["w"].astype(x.dtype) * scale)
        return means(x)

    with jax.enable_x64(True):
        params = {"w": np.asarray(draw(4, 4), np.float64), "s": draw(4)}
        for dtype in (np.float32, np.float64):
            _, result = check(loss_fn, params, np.asarray(X, dtype))
            for tree in (result.dots, result.grads):
                assert jax.tree.map(lambda leaf: leaf.dtype, tree) == {
                    "w": jnp.dtype(jnp.float64),
                    "s": jnp.dtype(jnp.float32),
                }


def test_a_number_that_is_none_reaches_its_own_row_only():
    def loss_fn(params, x):
        return means(jnp.tanh(dense(params, x)) @ params["w"].T)

    engine = GradDotProdEngine(loss_fn, val_batch_size=3)
    clean = engine(P, X)
    for number in (jnp.nan, jnp.inf):
        found = engine(P, X.at[1, 0].set(number))
        assert np.isnan(found.total()[1])
        rest = np.array([0, 2, 3])
        jax.tree.map(
            lambda dots, want, rest=rest: np.testing.assert_array_equal(dots[rest], want[rest]),
            found.dots,
            clean.dots,
        )


def test_an_array_that_numpy_holds():
    check(lambda p, x: means(jnp.asarray(x) @ p["w"]), {"w": np.asarray(W)}, np.asarray(X))
