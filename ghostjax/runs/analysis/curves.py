"""What a run measured, as numbers over the steps."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from ghostjax.runs.analysis.values import (
    Valued,
    both_ends,
    read_values,
    weights_of_steps,
)
from ghostjax.runs.store.run import Run

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
    yield from _known(names("norm/train"), steps, _means(source, "norm"))
    yield from _kinds(source, names)
    for which, valued in values.items():
        for own in _sums(source, which, valued, count):
            yield own.curve(names)


def _kinds(source: Run, names: "_Names") -> Iterator[Curve]:
    for which in source.sets:
        of_set = source.kinds.filter(pc.equal(source.kinds["set"], which))
        for kind in source.kinds["kind"].unique().to_pylist():
            own = of_set.filter(pc.equal(of_set["kind"], kind))
            scores = own["score"].to_numpy().astype(float)
            yield from _known(names(f"kinds/{which}/{kind}"), own["step"].to_numpy(), scores)


def _sums(source: Run, which: str, valued: Valued, count: int) -> list["_Sum"]:
    """What values come to: all, by domain, and of the examples of either end."""
    coded = source.domains.dictionary_encode()
    code_of, domains = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    visits = np.bincount(code_of, valued.visits, len(domains))
    largest = sorted(np.flatnonzero(visits).tolist(), key=lambda n: (-visits[n], domains[n]))
    ranked = valued.ranked()
    ends = ranked.select(np.concatenate(both_ends(ranked, count)))
    found = [_Sum(f"value/{which}/all", lambda places: places >= 0)]
    found += [
        _Sum(f"value/{which}/domain {domains[n]}", lambda places, n=n: code_of[places] == n)
        for n in largest[:MAX_DOMAINS]
    ]
    found += [
        _Sum(f"examples/{which}/{name}", lambda places, own=own: places == own)
        for name, own in zip(ends.ids, ends.ids.places)
    ]
    weights, column = weights_of_steps(source, which), f"score_{which}"
    for some in source.visits(column):
        scores = weights[some["step"]] * some[column]
        scored = np.isfinite(scores)
        for own in found:
            own.add(some["step"][scored], some["place"][scored], scores[scored])
    return found


class _Sum:
    """What the scores of some visits add up to, at the last of every step; ``holds`` tells of
    examples by their places whether their visits are among them."""

    def __init__(self, name: str, holds: Callable[[np.ndarray], np.ndarray]):
        self._name, self._holds = name, holds
        self._steps, self._sums, self._last = [], [], 0.0

    def add(self, steps: np.ndarray, places: np.ndarray, scores: np.ndarray) -> None:
        own = self._holds(places)
        steps, scores = steps[own], scores[own]
        if len(steps):
            sums = np.cumsum(np.concatenate([[self._last], scores]))[1:]
            ends = np.flatnonzero(np.append(np.diff(steps) > 0, True))
            self._steps.append(steps[ends])
            self._sums.append(sums[ends])
            self._last = sums[-1]

    def curve(self, names: "_Names") -> Curve:
        nothing = [np.zeros(0, int)]
        steps, sums = (np.concatenate(own or nothing) for own in (self._steps, self._sums))
        return Curve(names(self._name), steps, sums)


def _means(source: Run, column: str) -> np.ndarray:
    """[steps], the mean over the visits of each that have a number; NaN without any."""
    sums, counts = np.zeros((2, source.end))
    for some in source.visits(column):
        known = np.isfinite(some[column])
        np.add.at(sums, some["step"][known], some[column][known])
        np.add.at(counts, some["step"][known], 1)
    return np.divide(sums, counts, out=np.full(source.end, np.nan), where=counts > 0)


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
