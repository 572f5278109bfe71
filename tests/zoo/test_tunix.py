"""Tunix: its loss of fine-tuning, on Qwen 3 in NNX; all parameters, and LoRA of qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing, value_grad_and_dots
from tests.zoo.checks import MARKS, check, direction_like, package, redrawn, rows_apart

pytestmark = MARKS
B, T, VOCABULARY = 3, 6, 17


def batch_of_tokens():
    rng = np.random.default_rng(0)
    mask = np.ones((B, T), np.int32)
    mask[1, 4:] = 0
    return {
        "input_tokens": jnp.asarray(rng.integers(0, VOCABULARY, (B, T)), jnp.int32),
        "input_mask": jnp.asarray(mask),
        "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
    }


@pytest.mark.parametrize("kind", ["all", "experts", "lora"])
def test_tunix(kind):
    package("tunix")
    qwix = package("qwix")
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer

    sizes = {"num_layers": 2, "vocab_size": VOCABULARY, "embed_dim": 8, "hidden_dim": 12}
    heads = {"num_heads": 2, "head_dim": 4, "num_kv_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if kind == "experts" else {}
    config = qwen3.ModelConfig(
        **sizes, **heads, **experts, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True
    )
    batch = batch_of_tokens()
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    kept = nnx.Param
    if kind == "lora":
        provider = qwix.LoraProvider(module_path=".*q_proj|.*gate_proj", rank=2, alpha=4.0)
        inputs = batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
        model = qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(1))
        kept = nnx.LoRAParam
    # The trainer's own function; it has no public name but that of the trainer's attribute.
    trainer_loss = peft_trainer._default_loss_fn
    graphdef, params, rest = nnx.split(model, kept, ...)

    def loss_fn(params, batch):
        return trainer_loss(nnx.merge(graphdef, params, rest, copy=True), **batch)

    weights = batch["input_mask"][:, 1:].sum(1)
    params = redrawn(params)
    assert len(jax.tree.leaves(params)) >= 6
    result = check(loss_fn, params, batch, rows_apart(batch), weights)
    if kind == "all":  # the module itself, as the trainer has it
        fn = value_grad_and_dots(
            lambda model, batch: trainer_loss(model, **batch), loss_reduction="sum"
        )
        direct = fn(nnx.merge(graphdef, params, rest), batch, direction=direction_like(params))
        testing.assert_dots_close(direct.dots, result.dots)
