"""Which windows of long texts were scored, and how those read that counted most."""

from typing import NamedTuple

import numpy as np

from ghostjax.runs.analysis.values import visit_weights, visited_examples
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.store.run import Run

MAX_STARTS = 4
MAX_CHARACTERS = 300


class Window(NamedTuple):
    """What is shown of an example: a text, and in words which windows its visits saw."""

    text: str
    words: str


class Windows:
    """The windows of a run on texts; the examples of other runs have none.

    Args:
      task: the data of the run, read again. None: texts are how the examples begin.
    """

    def __init__(self, source: Run, task: TextTask | None = None):
        self._source, self._task = source, task
        self._starts: dict[int, set[int]] = {}
        self._most: dict[str, dict[int, tuple[int, int]]] = {}
        self._excerpts = source.examples["excerpt"].to_pylist()
        if source.metadata.get("task") == TextTask.name:
            starts = source.scores["start"].to_pylist()
            for place, start in zip(visited_examples(source).tolist(), starts):
                self._starts.setdefault(place, set()).add(start)

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
        if which not in self._most:
            self._most[which] = _counted_most(self._source, which)
        if place not in self._most[which]:
            return Window(self._excerpts[place], words)
        step, start = self._most[which][place]
        end = start + task.length + 1
        words += f"; shown is the one from {start}, step {step}, which counted most"
        return Window(_bounded("".join(task.pieces(place)[start:end])), words)


def _counted_most(source: Run, which: str) -> dict[int, tuple[int, int]]:
    """By place of an example, step and start of its visit that counted most."""
    places, steps = visited_examples(source), source.scores["step"].to_numpy()
    starts = source.numbers("scores", "start")
    parts = visit_weights(source, which) * source.numbers("scores", f"score_{which}")
    scored = np.flatnonzero(np.isfinite(parts) & np.isfinite(starts))
    places, parts = places[scored], parts[scored]
    values = np.bincount(places, parts)
    order = np.lexsort((parts * np.sign(values)[places], places))
    is_last = np.diff(places[order], append=-1) != 0
    return {int(places[n]): (int(steps[scored[n]]), int(starts[scored[n]])) for n in order[is_last]}


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
