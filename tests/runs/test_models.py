import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax.runs.models import GPT, SIZES, Block

MICRO = GPT(SIZES["micro"])


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.jit(MICRO.init)(jax.random.key(0), ids)["params"]


@jax.jit
def logits(params, tokens):
    return MICRO.apply({"params": params}, tokens)


def test_gpt2_is_gpt2_small_but_for_the_vocabulary():
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    model = GPT(SIZES["gpt2"])
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 124_439_808 - (50_257 - 256) * 768


def test_the_head_is_the_token_embedding(params):
    shapes = [leaf.shape for leaf in jax.tree.leaves(params) if 256 in leaf.shape]
    assert shapes == [(256, 16)]


def test_a_position_sees_no_later_token(params):
    tokens = jnp.array([[1, 2, 3, 4]])
    before, after = logits(params, tokens), logits(params, tokens.at[0, 2].set(9))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert not np.allclose(before[:, 2:], after[:, 2:])


def test_equal_tokens_at_other_positions_differ(params):
    found = logits(params, jnp.array([[5, 5, 5, 5]]))
    assert not np.allclose(found[:, 0], found[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [SIZES["micro"], dataclasses.replace(SIZES["micro"], layers=3)])
@pytest.mark.parametrize("remat", [False, True])
def test_blocks_are_applied_one_after_another(size, remat):
    model, tokens = GPT(size, remat=remat), jnp.array([[1, 2, 3, 4]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    kernels = params["blocks"]["up"]["kernel"]
    assert kernels.shape == (size.layers, 16, 64)
    assert not np.allclose(kernels[0], kernels[1])

    def one_by_one(params, tokens):
        embed = nn.Embed(256, 16)
        table = {"params": params["tokens"]}
        x = embed.apply(table, tokens) + params["positions"]["embedding"][None, :4]
        for layer in range(size.layers):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            x, _ = Block(size, jnp.float32).apply({"params": own}, x, None)
        x = nn.LayerNorm(epsilon=1e-5).apply({"params": params["norm"]}, x)
        return embed.apply(table, x, method="attend")

    found = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(found, jax.jit(one_by_one)(params, tokens), rtol=1e-4, atol=1e-6)
