"""Gemma 3 in Flax linen, with the loss of Kauldron that its fine-tuning examples take."""

import jax.numpy as jnp
import numpy as np

from tests.zoo.checks import MARKS, check, package, redrawn, rows_apart

pytestmark = MARKS


def test_gemma():
    package("gemma")
    import jax
    from gemma import gm
    from kauldron import kd

    whole = gm.nn.Gemma3_270M.config
    sizes = {"num_embed": 17, "embed_dim": 8, "hidden_dim": 12, "num_heads": 2, "head_dim": 4}
    kinds = sorted(set(whole.attention_types), key=str)
    config = type(whole)(
        **vars_of(whole) | sizes | {"attention_types": kinds, "sliding_window_size": 3}
    )
    model = gm.nn.Gemma3_270M(config=config, dtype=jnp.float32, tokens="batch.tokens")
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 17, (3, 6)), jnp.int32)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:, None]}
    params = redrawn(jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"])
    loss = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="logits", labels="labels")

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["tokens"]).logits
        return jnp.mean(loss.get_values(logits=logits, labels=batch["labels"]))

    check(loss_fn, params, batch, rows_apart(batch), np.ones(3))


def vars_of(config):
    import dataclasses

    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
