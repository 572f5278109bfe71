"""MaxText: its own loss function with its config; layers scanned, rows packed."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax import testing, value_grad_and_dots
from tests.zoo.checks import MARKS, check, direction_like, package, redrawn

pytestmark = MARKS
LENGTHS = [[5, 4], [3, 7], [6, 2, 4]]  # of documents; what is left of a row is padding
B, T, VOCABULARY = len(LENGTHS), 12, 32
DOCUMENTS = sum(map(len, LENGTHS))
DENSE = {
    "base_emb_dim": 16,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 1,
    "base_mlp_dim": 24,
    "base_num_decoder_layers": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_target_length": T,
    "per_device_batch_size": B,
}
SPARSE = {
    "decoder_block": "mixtral",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 24,
    "sparse_matmul": True,
    "megablox": False,  # ragged_dot: megablox is for TPUs
    "load_balance_loss_weight": 0.0,  # that loss couples rows: no row has a gradient of its own
}
# The loss in two tiles of the batch's positions, each of a row and a half.
TILED = {"num_vocab_tiling": 2, "z_loss_multiplier": 1e-2}
KINDS = {"dense": {}, "sparse": SPARSE, "tiled": TILED, "tied": {"logits_via_embedding": True}}
EXACT = {
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "attention": "dot_product",
    "scan_layers": True,
    "remat_policy": "full",
    "enable_dropout": False,
    "packing": True,
}
QUIET = {
    "run_name": "zoo",
    "enable_checkpointing": False,
    "dataset_type": "synthetic",
    "skip_jax_distributed_system": True,
    "log_config": False,
    "hardware": "cpu",
}


def packed():
    """(batch, labels): segments are numbered from 1 in every row, labels through all rows."""
    rng = np.random.default_rng(0)
    segments, positions, labels = (np.zeros((B, T), np.int32) for _ in range(3))
    labels -= 1
    count = 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            own = row, slice(start, start + length)
            segments[own], positions[own], labels[own] = number + 1, np.arange(length), count
            start, count = start + length, count + 1
    batch = {
        name: rng.integers(0, VOCABULARY, (B, T)).astype(np.int32) for name in ("inputs", "targets")
    }
    for name in ("inputs", "targets"):
        batch |= {f"{name}_position": positions, f"{name}_segmentation": segments}
    return jax.tree.map(jnp.asarray, batch), labels


def apart(batch, labels):
    """Batches of one document: what belongs to others is padding."""
    for number in range(DOCUMENTS):
        own = labels == number
        row = np.flatnonzero(own.any(1))
        kept = {name: leaf[row] for name, leaf in batch.items()}
        for name in ("inputs", "targets"):
            kept[f"{name}_segmentation"] = jnp.asarray(own[row].astype(np.int32))
        yield kept


def in_bfloat16(tree):
    """What bfloat16 holds of the embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.astype(jnp.bfloat16).astype(leaf.dtype)
            if "embedding" in jax.tree_util.keystr(path)
            else leaf
        ),
        tree,
    )


def logits_in_float32(query, table, dtype, config, out_sharding=None):
    """MaxText's own takes the table in bfloat16 in any case, and so it rounds the gradient after
    the sum over documents: those of documents apart, rounded, add up to another one."""
    del config, out_sharding
    return jnp.dot(query, jnp.asarray(table, dtype).T, preferred_element_type=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_maxtext(kind, monkeypatch):
    package("maxtext")
    package("pathwaysutils")
    if len(jax.devices()) > 1:
        pytest.skip("MaxText takes every device there is; for one device, set XLA_FLAGS")
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.layers import nnx_decoders
    from maxtext.trainers.pre_train import train
    from maxtext.utils import maxtext_utils, model_creation_utils

    base = os.path.join(os.path.dirname(pyconfig.__file__), "base.yml")
    config = pyconfig.initialize(["", base], **DENSE | EXACT | QUIET | KINDS[kind])
    mesh = maxtext_utils.get_mesh_from_config(config)
    model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert any("moe" in name.lower() for name in names) == (kind == "sparse"), names

    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss, _ = train.loss_fn(model, config, batch, None, None, is_train=True)
        return loss

    batch, labels = packed()
    given = {"labels": jnp.asarray(labels), "num_labels": DOCUMENTS}
    params = in_bfloat16(redrawn(params))
    direction = in_bfloat16(direction_like(params))
    documents = list(apart(batch, labels)), [n for lengths in LENGTHS for n in lengths]
    with jax.set_mesh(mesh):
        if kind == "tied":
            result = jax.jit(
                lambda params: value_grad_and_dots(loss_fn, loss_reduction="sum")(
                    params, batch, direction=direction, **given
                )
            )(params)
            monkeypatch.setattr(nnx_decoders, "attend_on_embedding", logits_in_float32)
            jax.clear_caches()  # of what was traced before
        expected = check(loss_fn, params, batch, *documents, direction, **given)
        if kind == "tied":
            testing.assert_dots_close(result.dots, expected.dots, rtol=1e-5)
