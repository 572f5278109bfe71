"""A program's dots, early or late, of rows or of positions, against per-row autodiff."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax import conservation_error, value_and_dots_fn, value_grad_and_dots
from tests.fuzz.programs import Program

RTOL = 1e-9
# Groups of rows, where rows have labels.
GROUPS = 3
# What ghostjax refuses by name.
REFUSALS = (ValueError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    kind: "exact", "refused", "NaN" (with a count of conflicts) or "wrong".
    reason: of what is refused, in words that tell kinds of refusals apart.
    message: all that was said, or by how much which number is off.
    """

    kind: str
    reason: str = ""
    message: str = ""


def outcome(program: Program, *, late: bool | None = None) -> Outcome:
    """Float64 has to be enabled. What is neither exact nor refused comes as "wrong".

    ``late``: which function is asked, ``value_and_dots_fn`` or ``value_grad_and_dots``; by default
    one as often as the other, as compiling is what costs time.
    """
    late = bool(program.seed // 2 % 2) if late is None else late
    params, batch, flag = program.arrays()
    directions = program.directions()
    if not late:
        directions = jax.tree.map(lambda leaf: leaf[0], directions)

    def run(params, batch, flag, directions):
        found = _found(program, params, batch, flag, directions, late)
        errors = jax.tree.map(jnp.max, conservation_error(found, directions))
        return found, _expected(program, params, batch, flag, directions), errors

    try:
        lowered = jax.jit(run).lower(params, batch, flag, directions)
    except REFUSALS as error:
        reason = reason_of(error)
        if reason is None:
            raise
        return Outcome("refused", reason, f"{type(error).__name__}: {error}")
    result, expected, errors = lowered.compile()(params, batch, flag, directions)
    value, grads, dots, nobody = expected
    if int(result.conflicts) > 0:
        if not all(np.isnan(leaf).all() for leaf in jax.tree.leaves(result.dots)):
            return Outcome("wrong", message=f"{result.conflicts} conflicts, but not all dots NaN")
        return Outcome("NaN", "conflicts when it runs", f"{result.conflicts}")
    wrong = [
        *differences("value", result.value, value),
        *differences("grads", result.grads, result.grads if grads is None else grads),
        *differences("dots", result.dots, dots),
    ]
    # What rows have in common is as small as rounding where all rows have labels.
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves((dots, nobody)))
    wrong += differences("shared", result.shared, nobody, largest)
    wrong += [
        f"certificate: {name}: {error}" for name, error in errors.items() if not error <= RTOL
    ]
    return Outcome("wrong", message="\n".join(wrong)) if wrong else Outcome("exact")


def labels_for(program) -> dict[str, Any]:
    """Of every position one of its own, where these are told apart; every other program of rows has
    groups of rows, and rows of nobody."""
    if program.family == "positions":
        count = program.sizes.b * program.sizes.t
        labels = np.arange(count).reshape(program.sizes.b, program.sizes.t)
        return {"labels": labels, "num_labels": count}
    if program.family == "rows" and program.seed // 4 % 2:
        labels = np.random.default_rng([program.seed, 3]).integers(-2, GROUPS, program.sizes.b)
        return {"labels": labels, "num_labels": GROUPS}
    return {}


def members(program) -> np.ndarray:
    """[S, B]: which rows an example has."""
    labels = labels_for(program).get("labels", np.arange(program.sizes.b))
    count = GROUPS if "labels" in labels_for(program) else program.sizes.b
    return np.equal.outer(np.arange(count), labels).astype(np.float64)


def _found(program, params, batch, flag, directions, late: bool):
    given = labels_for(program)
    if late:
        fn = value_and_dots_fn(program.loss, loss_reduction=program.reduction)
        return fn(params, batch, flag, **given)[2].result(directions)
    fn = value_grad_and_dots(program.loss, loss_reduction=program.reduction)
    return fn(params, batch, flag, direction=directions, **given)


def _expected(program, params, batch, flag, directions):
    """The value, the gradient (if rows tell it), by parameter dots [..., examples], and the part of
    nobody."""
    scale = program.sizes.b if program.reduction == "mean" else 1
    if program.family == "rows":
        of_rows = jax.vmap(jax.value_and_grad(program.row_loss), in_axes=(None, 0, None))
        values, grads = of_rows(params, batch, flag)

        def dots(rows, vectors):
            return jnp.tensordot(
                vectors.reshape(*vectors.shape[: vectors.ndim - rows.ndim + 1], -1),
                rows.reshape(len(rows), -1),
                ((-1,), (1,)),
            )

        total = jax.tree.map(lambda rows: jnp.sum(rows, axis=0) / scale, grads)
        of_rows = jax.tree.map(dots, grads, directions)
        own = members(program)
        of_groups = jax.tree.map(lambda leaf: leaf @ own.T, of_rows)
        nobody = jax.tree.map(lambda leaf: leaf @ (1 - own.sum(axis=0)) / scale, of_rows)
        return jnp.sum(values) / scale, total, of_groups, nobody

    count = program.sizes.b * (program.sizes.t if program.family == "positions" else 1)
    steps = jax.tree.map(lambda _: jnp.zeros(count, jnp.float64), params)

    def shares(direction):
        found = jax.value_and_grad(program.moved_loss)(steps, params, batch, flag, direction)
        return found[0], jax.tree.map(lambda leaf: leaf * scale, found[1])

    is_stacked = jax.tree.leaves(directions)[0].ndim > jax.tree.leaves(params)[0].ndim
    value, dots = jax.vmap(shares)(directions) if is_stacked else shares(directions)
    none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:-1]), dots)
    return jnp.ravel(value)[0], None, dots, none


def differences(name: str, own: Any, wanted: Any, largest: float = 0.0) -> list[str]:
    largest = max(largest, *(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(wanted)))
    found = []
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(wanted), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        size = max(np.max(np.abs(b)), 1e-3 * largest, 1e-300)
        if not np.max(np.abs(a - b)) <= RTOL * size:
            found.append(f"{name}{jax.tree_util.keystr(path)}: found {a}, expected {b}")
    return found


# By kind of refusal, what its message has.
REASONS = {
    "several axes": "examples are told apart along several axes",
    "no position": "has no axis of positions",
    "lost where a parameter is used": "whose result has no axis with one row per place",
    "mixed rows are combined": "combines rows with a value in which rows are mixed",
    "rows are combined": "combines rows with other rows",
    "cannot be walked": "cannot be walked",
    "while loop": "a while loop",
    "in a rule": "rule of ",
}


def reason_of(error: Exception) -> str | None:
    """None of what is no refusal."""
    text = str(error)
    return next((name for name, words in REASONS.items() if words in text), None)
