"""What a run measured, as numbers over the steps."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ghostjax.runs.analysis.values import (
    Valued,
    both_ends,
    read_values,
    weights_of_steps,
)
from ghostjax.runs.store.run import Run, find

MAX_DOMAINS = 20  # those with the most visits
_OF_SETS = {
    "loss/{}": "val_loss_{}",
    "decrease/{}/predicted": "predicted_{}",
    "decrease/{}/actual": "actual_{}",
    "fidelity/{}/correlation": "correlation_{}",
    "fidelity/{}/conservation_error": "conservation_error_{}",
    "fidelity/{}/audit_error": "audit_error_{}",
}


class Curve(NamedTuple):
    """Numbers [n] of some steps [n], which ascend; names have parts, between slashes."""

    name: str
    steps: np.ndarray
    numbers: np.ndarray


def curves(source: Run, count: int) -> Iterator[Curve]:
    """What the log has of losses, decreases and fidelity at single steps, and values up to a step.

    Values are those of all visits up to a step, by domain (of up to ``MAX_DOMAINS``), and of the
    ``count`` examples of either end of each validation set. Steps that have no number are left out.

    Raises:
      UsageError: as ``read_values``.
    """
    values, names = read_values(source), _Names()
    steps = np.arange(source.end)
    found = {"loss/train": "loss", "learning_rate": "learning_rate"}
    for which in source.sets:
        found |= {name.format(which): own.format(which) for name, own in _OF_SETS.items()}
    for name, column in found.items():
        yield from _known(names(name), steps, source.numbers("steps", column))
    norms, of_visits = source.numbers("scores", "norm"), source.scores["step"].to_numpy()
    yield from _known(names("norm/train"), *_means(of_visits, norms))
    yield from _kinds(source, names)
    for which, valued in values.items():
        yield from _values(source, which, valued, count, names)


def _kinds(source: Run, names: "_Names") -> Iterator[Curve]:
    table = {name: np.array(source.kinds[name].to_pylist()) for name in source.kinds.column_names}
    for which in source.sets:
        for kind in dict.fromkeys(table["kind"].tolist()):
            own = (table["set"] == which) & (table["kind"] == kind)
            scores = table["score"][own].astype(float)
            yield from _known(names(f"kinds/{which}/{kind}"), table["step"][own], scores)


def _values(
    source: Run, which: str, valued: Valued, count: int, names: "_Names"
) -> Iterator[Curve]:
    places = np.concatenate([some["place"] for some in source.visits()])
    steps = source.scores["step"].to_numpy()
    scores = weights_of_steps(source, which)[steps] * source.numbers("scores", f"score_{which}")
    scored = np.isfinite(scores)
    places, steps, scores = places[scored], steps[scored], scores[scored]

    def up_to(name: str, mask: np.ndarray) -> Curve:
        own, ends = np.unique(steps[mask][::-1], return_index=True)  # the last visit of each step
        sums = np.cumsum(scores[mask])
        return Curve(names(name), own, sums[len(sums) - 1 - ends])

    yield up_to(f"value/{which}/all", np.ones(len(steps), bool))
    domains = np.array(list(valued.domains))[places]
    found, visits = np.unique(domains, return_counts=True)
    for domain in found[np.argsort(-visits, kind="stable")][:MAX_DOMAINS]:
        yield up_to(f"value/{which}/domain {domain}", domains == domain)
    ranked = valued.ranked()
    ends = ranked.select(np.concatenate(both_ends(ranked, count)))
    for name, place in zip(ends.ids, find(ends.ids, source.ids)):
        yield up_to(f"examples/{which}/{name}", places == place)


def _means(steps: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the rows of each step that have a number."""
    known = np.isfinite(numbers)
    found, which = np.unique(steps[known], return_inverse=True)
    return found, np.bincount(which, numbers[known]) / np.bincount(which)


def _known(name: str, steps: np.ndarray, numbers: np.ndarray) -> Iterator[Curve]:
    known = np.isfinite(numbers)
    if known.any():
        yield Curve(name, steps[known], numbers[known])


class _Names:
    """Names in letters, digits and ``-_./`` alone, none twice.

    >>> names = _Names()
    >>> names("loss/a b"), names("loss/a:b"), names("loss/c")
    ('loss/a_b', 'loss/a_b_2', 'loss/c')
    """

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, name: str) -> str:
        plain = re.sub(r"[^-\w./]", "_", name, flags=re.ASCII)
        found, number = plain, 1
        while found in self._given:
            number += 1
            found = f"{plain}_{number}"
        self._given.add(found)
        return found
