"""Norms, clipped gradients, pairs and cosines of random programs, beside rows' gradients written
out."""

import jax
import jax.numpy as jnp

from ghostjax import pairwise_dots, squared_norms, value_and_clipped_grad, value_grad_and_dots
from tests.fuzz.compare import REFUSALS, Outcome, differences, labels_for, members, reason_of

NAMES = "norms", "clipped", "pairs", "norms beside dots", "cosines"


def norms_outcome(program) -> Outcome:
    """Float64 has to be enabled. Not for programs that mix rows."""
    params, batch, flag = program.arrays()
    given, scale = labels_for(program), program.sizes.b if program.reduction == "mean" else 1

    def run(params, batch, flag):
        rows = jax.tree.map(
            lambda leaf: leaf.reshape(len(leaf), -1), _gradients(program, params, batch, flag)
        )
        squares = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf), axis=1), rows)
        norms = jnp.sqrt(sum(jax.tree.leaves(squares)))
        # Of which some are clipped and some are not; there may be a row without gradient.
        middle = jnp.median(norms)
        largest = jnp.where(middle > 0, middle, 1)
        weights = jnp.minimum(1, largest / jnp.where(norms > 0, norms, 1))
        clipped = jax.tree.map(
            lambda leaf, like: (weights @ leaf / scale).reshape(like.shape), rows, params
        )
        own = squared_norms(program.loss, loss_reduction=program.reduction)
        clip = value_and_clipped_grad(program.loss, largest, loss_reduction=program.reduction)
        pairs = pairwise_dots(program.loss, loss_reduction=program.reduction)
        beside = value_grad_and_dots(program.loss, loss_reduction=program.reduction, norms=True)
        direction = jax.tree.map(lambda leaf: leaf[0], program.directions())
        result = beside(params, batch, flag, direction=direction, **given)
        vector = jax.tree.map(jnp.ravel, direction)
        dots = sum(jax.tree.leaves(jax.tree.map(jnp.matmul, rows, vector)))
        sizes = norms * jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(vector)))
        found = (
            own(params, batch, flag, **given),
            clip(params, batch, flag, **given)[1],
            pairs(params, batch, flag, **given),
            result.squared_norms,
            result.cosine(direction),
        )
        gram = jax.tree.map(lambda leaf: leaf @ leaf.T, rows)
        cosines = jnp.where(sizes > 0, dots / jnp.where(sizes > 0, sizes, 1), 0)
        return found, (squares, clipped, gram, squares, cosines)

    try:
        lowered = jax.jit(run).lower(params, batch, flag)
    except REFUSALS as error:
        reason = reason_of(error)
        if reason is None:
            raise
        return Outcome("refused", reason, f"{type(error).__name__}: {error}")
    pairs = zip(NAMES, *lowered.compile()(params, batch, flag))
    wrong = [line for name, *pair in pairs for line in differences(name, *pair)]
    return Outcome("wrong", message="\n".join(wrong)) if wrong else Outcome("exact")


def _gradients(program, params, batch, flag):
    """By parameter, those of examples."""
    if program.family == "rows":
        of_row = jax.vmap(jax.grad(program.row_loss), in_axes=(None, 0, None))
        own = members(program)
        return jax.tree.map(lambda leaf: jnp.tensordot(own, leaf, 1), of_row(params, batch, flag))
    scale = program.sizes.b if program.reduction == "mean" else 1
    steps = jax.tree.map(lambda _: jnp.zeros(program.sizes.b * program.sizes.t), params)

    def shares(direction):  # linear
        return jax.grad(program.moved_loss)(steps, params, batch, flag, direction)

    found = jax.jacrev(shares)(jax.tree.map(jnp.zeros_like, params))
    return {name: found[name][name] * scale for name in params}
