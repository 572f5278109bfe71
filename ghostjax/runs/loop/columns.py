"""What a training loop gives, as columns of the log: checked before anything is kept of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import numpy as np

from ghostjax.runs.listed import is_unicode

ROUNDING = 0.01  # more than that of scores in bfloat16


def texts_of_ids(ids: Any) -> tuple[np.ndarray, str]:
    """Ids [B] as texts that a table can hold, and what they were.

    >>> texts_of_ids(np.array([3, 0]))
    (array(['3', '0'], dtype=object), 'integers')

    Raises:
      ValueError, TypeError: they are not [B], or neither Unicode texts nor integers.
    """
    array = np.asarray(outside_jit("ids", ids))
    if array.ndim != 1:
        raise ValueError(f"ids must be [B], got shape {list(array.shape)}.")
    if array.dtype.kind in "iu":
        if (array < 0).any():
            raise ValueError("ids must not be negative: leave out rows that are padding.")
        return array.astype(str).astype(object), "integers"
    if not all(isinstance(one, str) for one in array.tolist()):
        raise TypeError("ids must be strings or integers.")
    for one in array.tolist():
        check_unicode("id", one)
    return array.astype(object), "strings"


def check_unicode(where: str, text: str) -> None:
    """Raises ``ValueError`` for a text that a table cannot hold."""
    if not is_unicode(text):
        raise ValueError(
            f"{where} {text!r} is no Unicode text, as a file's name may be: give another, such as "
            "text.encode(errors='backslashreplace').decode()."
        )


def numbers(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """As float32 of a shape.

    Raises:
      ValueError, TypeError: the shape is another one (checked with chex), or it is no number.
    """
    array = np.asarray(outside_jit(name, value))
    chex.assert_shape(
        array, shape, custom_message=f"{name} must be {list(shape)}.", exception_type=ValueError
    )
    if array.dtype.kind not in "fiuV":  # V: bfloat16
        raise TypeError(f"{name} must be numbers, got {array.dtype}.")
    with np.errstate(over="ignore"):  # infinite then, which is told
        return array.astype(np.float32)


def by_set(name: str, value: Any, sets: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """As float32 [K, *shape], from one array per validation set by its name, from an array
    [K, *shape], or with a single set from an array of ``shape``.

    >>> by_set("scores", {"a": [1.0, 2.0], "b": [3.0, 4.0]}, ["b", "a"], (2,)).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """
    if isinstance(value, Mapping):
        if set(value) != set(sets):
            raise ValueError(
                f"{name}: expected one per validation set, {', '.join(sets)}; got "
                f"{', '.join(map(str, value))}."
            )
        return np.stack([numbers(f"{name}[{which!r}]", value[which], shape) for which in sets])
    array = np.asarray(outside_jit(name, value))
    if len(sets) == 1 and array.ndim == len(shape):
        array = array[None]
    return numbers(name, array, (len(sets), *shape))


def outside_jit(name: str, value: Any) -> Any:
    """``value``, unless it is an abstract value of a traced function."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        raise TypeError(
            f"{name} is being traced: call the log outside jax.jit, with what the jitted step "
            "returns."
        )
    return value


def check_finite(name: str, array: np.ndarray, ids: np.ndarray, step: int) -> None:
    """Raises ``ValueError`` that names the ids of those [..., B] that are not finite."""
    is_bad = ~np.isfinite(array).reshape(-1, len(ids)).all(0)
    if is_bad.any():
        bad = ids[is_bad].tolist()
        listed = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if bad[4:] else "")
        raise ValueError(
            f"step {step}: {name} of {listed} is not finite; nothing was logged of this step."
        )


def parts_by_kind(
    kinds: Mapping[str, Any], scores: np.ndarray, sets: Sequence[str], ids: np.ndarray
) -> dict[str, np.ndarray]:
    """What each kind of layer has in scores [K, B]: by kind float32 [K, B].

    Raises:
      ValueError, TypeError: shapes or names do not fit, or they do not add up to the scores.
    """
    if not isinstance(kinds, Mapping) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(
            "kinds must be by the name of a kind of layer, as ghostjax.by_kind gives them."
        )
    found = {kind: by_set(f"kinds[{kind!r}]", own, sets, ids.shape) for kind, own in kinds.items()}
    parts = np.stack([*found.values(), np.zeros_like(scores)]).astype(np.float64)
    off = np.abs(parts.sum(0) - scores)
    size = max(np.abs(parts).sum(0).max(initial=0), np.abs(scores).max(initial=0))
    if not (off <= ROUNDING * size).all():
        which, row = np.unravel_index(np.argmax(off), off.shape)
        raise ValueError(
            f"kinds do not add up to the scores: for {ids[row]} and validation set {sets[which]} "
            f"to {parts.sum(0)[which, row]:.3g}, its score is {scores[which, row]:.3g}. Give the "
            "parts of all parameters, in the scale of the scores."
        )
    return found
