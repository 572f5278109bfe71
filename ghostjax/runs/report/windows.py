"""Which windows of long texts were scored, and how those read that counted most."""

from typing import NamedTuple

import numpy as np

from ghostjax.runs.analysis.values import weights_of_steps
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.store.run import Run

MAX_STARTS = 4
MAX_CHARACTERS = 300


class Window(NamedTuple):
    """What is shown of an example: a text, and in words which windows its visits saw."""

    text: str
    words: str


class Windows:
    """The windows of some examples of a run on texts; those of other runs have none.

    Args:
      task: the data of the run, read again. None: texts are how the examples begin.
      places: of the examples that ``of`` may be asked for.
    """

    def __init__(self, source: Run, task: TextTask | None, places: np.ndarray):
        places = np.unique(places)
        self._task = task
        self._excerpts = dict(zip(places.tolist(), source.excerpts(places).to_pylist()))
        self._starts: dict[int, set[int]] = {}
        self._most: dict[str, dict[int, tuple[int, int]]] = {}
        if source.metadata.get("task") != TextTask.name:
            return
        scores, starts = [f"score_{name}" for name in source.sets], "start"
        found = [
            {name: own[np.isin(some["place"], places)] for name, own in some.items()}
            for some in source.visits(starts, *scores)
        ]
        visits = {name: np.concatenate([some[name] for some in found]) for name in found[0]}
        known = np.isfinite(visits[starts])
        for place, start in zip(visits["place"][known].tolist(), visits[starts][known].tolist()):
            self._starts.setdefault(place, set()).add(int(start))
        for name, score in zip(source.sets, scores):
            parts = weights_of_steps(source, name)[visits["step"]] * visits[score]
            self._most[name] = _counted_most(visits, parts)

    def of(self, which: str, place: int) -> Window:
        """Of an example: of several windows, the text is that of the visit that counted most for
        the value, upwards where it is positive and downwards where it is negative."""
        starts = sorted(self._starts.get(place, ()))
        if not starts:
            return Window(self._excerpts[place], "")
        more = f" and {len(starts) - MAX_STARTS} more" if len(starts) > MAX_STARTS else ""
        words = f"windows from token {', '.join(map(str, starts[:MAX_STARTS]))}{more}"
        task = self._task
        if task is None:
            return Window(self._excerpts[place], words)
        if task.examples.sizes[place] <= task.length + 1:  # the whole text is one window
            return Window(self._excerpts[place], "")
        if place not in self._most[which]:
            return Window(self._excerpts[place], words)
        step, start = self._most[which][place]
        end = start + task.length + 1
        words += f"; shown is the one from {start}, step {step}, which counted most"
        return Window(_bounded("".join(task.pieces(place)[start:end])), words)


def _counted_most(visits: dict[str, np.ndarray], parts: np.ndarray) -> dict[int, tuple[int, int]]:
    """By place of an example, step and start of its visit that counted most, by these parts."""
    scored = np.flatnonzero(np.isfinite(parts) & np.isfinite(visits["start"]))
    places, parts = visits["place"][scored], parts[scored]
    known, which = np.unique(places, return_inverse=True)
    values = np.bincount(which, parts, len(known))
    order = np.lexsort((parts * np.sign(values)[which], places))
    is_last = np.diff(places[order], append=-1) != 0
    rows = scored[order[is_last]]
    ends = zip(visits["step"][rows].tolist(), visits["start"][rows].astype(int).tolist())
    return dict(zip(visits["place"][rows].tolist(), ends))


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
