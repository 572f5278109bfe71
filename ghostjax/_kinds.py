"""by_kind: inner products by the kind of layer."""

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ghostjax._dtypes import wide_dtype

KINDS = ("LayerNorm", "attention", "MLP", "embedding", "other")


def kind_of(path: str) -> str:
    """The kind of layer a parameter belongs to, by the words in its path: those that are common in
    models. It is a name, for sums; nothing else depends on it.

    >>> kind_of("['blocks']['norm_1']['scale']"), kind_of("['blocks']['qkv']['kernel']")
    ('LayerNorm', 'attention')
    >>> kind_of("['tokens']['embedding']"), kind_of("['blocks']['up']['bias']")
    ('embedding', 'MLP')
    >>> kind_of(".layers[0].self_attn.q_proj.weight"), kind_of("['LayerNorm_0']['scale'].value")
    ('attention', 'LayerNorm')
    >>> kind_of("['Dense_0']['kernel']"), kind_of("['temperature']")
    ('MLP', 'other')
    """
    words = path.lower()
    return next((kind for kind, known in _WORDS.items() if re.search(known, words)), "other")


# The first that fits; a word of a name ends at what is no letter.
_WORDS = {
    "LayerNorm": r"norm|\bln_?",
    "attention": r"att|qkv|\b[qkvo]_proj|\b(query|key|value|out)\b(?!$)",
    "embedding": r"embed|\bw[tp]e\b",
    "MLP": r"mlp|dense|linear|classes|ffn?_|feed_?forward|\b(up|down|gate|fc|head)",
}


def by_kind(dots: Any, kind: Callable[[str], str] = kind_of) -> dict[str, jax.Array]:
    """Sums a tree of per-row inner products over the parameters of each kind of layer.

        by_kind(dots)[kind][i] = sum of dots[p][i] over the parameters p of this kind

    All kinds together add up to ``aggregate(dots)``.

    Args:
      dots: tree whose leaves are all [B], or all [K, B], and floating point.
      kind: from the path of a parameter, as ``jax.tree_util.keystr`` has it, to the name of its
        kind. By default the kinds are LayerNorm (any norm), attention, MLP, embedding and other, by
        words in the path such as norm, qkv, dense, embed.

    Returns:
      By kind, in the order in which kinds are met: [B] or [K, B], float32 (float64 if a leaf is).

    Raises:
      AssertionError: shapes of leaves differ, or they are not floating point (checked with chex).

    >>> dots = {"attention": jnp.ones(2), "norm": {"bias": jnp.ones(2), "scale": jnp.arange(2.0)}}
    >>> by_kind(dots)
    {'attention': Array([1., 1.], dtype=float32), 'LayerNorm': Array([1., 2.], dtype=float32)}
    """
    leaves = jax.tree_util.tree_leaves_with_path(dots)
    chex.assert_equal_shape([leaf for _, leaf in leaves])
    chex.assert_type([leaf for _, leaf in leaves], float)
    found: dict[str, jax.Array] = {}
    for path, leaf in leaves:
        name = kind(jax.tree_util.keystr(path))
        own = jnp.asarray(leaf, wide_dtype(leaf))
        found[name] = found[name] + own if name in found else own
    return found
