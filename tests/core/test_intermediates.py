"""Every intermediate of whole models, one equation at a time: what changes when one row does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from ghostjax.core.places import Mixed, Rows, infer, propagate
from tests.core.rows import (
    IMAGE,
    SPOTS,
    X2,
    B,
    assert_only,
    counts,
    merged,
    redrawn,
)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm()(nn.Dense(2 * B)(x)))
        return nn.Dense(5)(nn.Dropout(0.2, deterministic=False)(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        q, k, v = jnp.split(nn.Dense(3 * width)(nn.LayerNorm()(x)), 3, axis=-1)
        q, k, v = (h.reshape(*h.shape[:2], 2, -1) for h in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->hbqk", q, k)
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        x = x + nn.Dense(width)(jnp.einsum("hbqk,bkhd->bqhd", weights, v).reshape(x.shape))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x)))), None


class Language(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(7, B)
        x = embed(words) + self.param("place", nn.initializers.normal(), (1, words.shape[1], B))
        if self.scanned:
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = layers(name="layers")(x, None)
        else:
            x, _ = Block()(x, None)
        return embed.attend(nn.LayerNorm()(x))


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.GroupNorm(2)(nn.Conv(B, (3, 3), strides=2)(x)))
        return nn.Dense(5)(nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, words):
        return nn.Dense(7)(nn.RNN(nn.LSTMCell(B), time_major=False)(nn.Embed(7, 3)(words)))


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def of_classes(logits, labels):
    return cross_entropy(logits, labels % 5)


def of_words(logits, words):
    return cross_entropy(logits[:, :-1], words[:, 1:]).mean(-1)


def of_merged_words(logits, words):
    losses = cross_entropy(merged(logits[:, :-1]), words[:, 1:].ravel())
    return losses.reshape(words.shape[0], -1).sum(-1)


MODELS = [
    pytest.param(Perceptron(), X2, SPOTS, of_classes, id="mlp"),
    pytest.param(
        Language(), counts((B, B + 1), 7), None, of_words, id="gpt", marks=pytest.mark.slow
    ),
    pytest.param(Language(True), counts((B, B), 7), None, of_merged_words, id="scanned gpt"),
    pytest.param(Pictures(), IMAGE, SPOTS, of_classes, id="conv"),
    pytest.param(Recurrent(), counts((B, B), 7), None, of_words, id="lstm", marks=pytest.mark.slow),
]


CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def intermediates(jaxpr, infos, values, notes):
    """Values of every output of every equation, inside calls too; (name, info) go to notes."""
    kept = [v for eqn in jaxpr.eqns for v in eqn.outvars if type(v) is core.Var]
    every = core.ClosedJaxpr(jaxpr.replace(outvars=kept), [])
    found = dict(zip(kept, core.jaxpr_as_fun(every)(*values)))
    known = dict(zip(jaxpr.invars, zip(infos, values)))
    inside = []
    for eqn in jaxpr.eqns:
        pairs = [(None, v.val) if isinstance(v, core.Literal) else known[v] for v in eqn.invars]
        operands = [info for info, _ in pairs]
        if eqn.primitive.name in CALLS:
            inner = eqn.params[CALLS[eqn.primitive.name]]
            inner = getattr(inner, "jaxpr", inner)
            inside += intermediates(inner, operands, [value for _, value in pairs], notes)
        for var, info in zip(eqn.outvars, propagate(eqn, operands, B)):
            if var in found:
                known[var] = info, found[var]
                inside.append(found[var])
                notes.append((eqn.primitive.name, info))
    return inside


@pytest.mark.slow
@pytest.mark.parametrize(("model", "inputs", "labels", "loss"), MODELS)
def test_every_intermediate(model, inputs, labels, loss):
    noise = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = model.init(noise, inputs)
    labels = inputs if labels is None else labels

    def losses(params, inputs, labels):
        return loss(model.apply(params, inputs, rngs=noise), labels)

    closed = jax.make_jaxpr(losses)(params, inputs, labels)
    leaves = jax.tree.leaves(params)
    infos = [*[None] * len(leaves), Rows(0), Rows(0)]
    assert infer(closed.jaxpr, infos, B) == [Rows(0)]

    changed = [redrawn([x], 1)[0] for x in (inputs, labels)]
    jaxpr = closed.jaxpr.replace(
        constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars]
    )
    infos = [*[None] * len(closed.consts), *infos]
    notes = []
    run = jax.jit(lambda *values: intermediates(jaxpr, infos, values, notes))
    before = run(*closed.consts, *leaves, inputs, labels)
    after = run(*closed.consts, *leaves, *changed)
    seen = 0
    for (name, info), old, new in zip(notes, before, after, strict=True):
        assert not isinstance(info, Mixed), (name, info)
        if isinstance(info, Rows):
            seen += assert_only(1, info, old, new)
        elif not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(old, new)
    assert seen > 20
