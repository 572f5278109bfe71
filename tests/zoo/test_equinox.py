"""Language models in Equinox: Qwen 3, dense and with experts, as ``eqx_zoo`` has it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import testing, value_grad_and_dots
from tests.zoo.checks import MARKS, check, direction_like, package, redrawn, rows_apart

pytestmark = MARKS
B, T, VOCABULARY = 3, 6, 17
EXPERTS = {
    "architecture": "Qwen3MoeForCausalLM",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
    "moe_layers": (1,),
}


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_equinox(kind):
    eqx = package("equinox")
    eqx_zoo = package("eqx_zoo")
    whole = {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "qk_norm": True,
        "rope_scaling": None,
    }
    config = eqx_zoo.Config(**whole | (EXPERTS if kind == "experts" else {}))
    params, static = eqx.partition(
        eqx_zoo.CausalLM(config, key=jax.random.key(0)), eqx.is_inexact_array
    )
    params = redrawn(params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (B, T)), jnp.int32)

    def loss_fn(model, tokens):
        # JAX has no jax.vmap of ragged_dot with all its operands.
        each_row = jax.lax.map if kind == "experts" else lambda f, xs: jax.vmap(f)(xs)
        logits = each_row(lambda row: model(row)[0], tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    def of_params(params, tokens):
        return loss_fn(eqx.combine(params, static), tokens)

    result = check(of_params, params, tokens, rows_apart(tokens), np.ones(B))
    fn = eqx.filter_jit(value_grad_and_dots(loss_fn, loss_reduction="sum"))
    direct = fn(eqx.combine(params, static), tokens, direction=direction_like(params))
    testing.assert_dots_close(direct.dots, result.dots)
