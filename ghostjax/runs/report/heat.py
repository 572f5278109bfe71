"""Texts whose tokens are coloured by their scores, as a page and in the terminal."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ghostjax.runs.analysis.scale import Scale
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.task import Example
from ghostjax.runs.report import output
from ghostjax.runs.report.html import LIGHT, Table, escape, render
from ghostjax.runs.store.run import Run
from ghostjax.runs.training.positions import Windows

LEVELS = 6  # of either colour
MIXED = 52  # percent of the colour in the strongest level: letters stay readable on it
QUANTILE = 0.98  # of the sizes: a few tokens beyond it do not leave the rest without colour
STRONGEST = 8  # tokens in the list of a window


class Shown(NamedTuple):
    """What is coloured at once: a token, or the tokens that make up one character."""

    text: str
    position: int
    tokens: int
    score: float
    error: float | None  # None for several tokens: their errors do not add up


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of a training document, scored for one validation set.

    Attributes:
      start, end: its tokens in the document, of ``size``; the last one is only predicted.
      total, error: its score as a row; ``loss`` is its own.
      parts: what is coloured, in order;  rest: the text of its last token, if it is not shown.
    """

    example: Example
    start: int
    end: int
    loss: float
    total: float
    error: float
    parts: list[Shown]
    rest: str

    @classmethod
    def of(
        cls, example: Example, pieces: Sequence[str], found: Windows, k: int, row: int
    ) -> "Window":
        """Window ``row`` of validation set ``k``; ``pieces`` are those of the whole document."""
        start, count = int(found.starts[row]), int(found.counts[row])
        own, rest = list(pieces[start : start + count]), pieces[start + count]
        if not own[-1]:  # the window ends within a character
            own[-1], rest = next(filter(None, pieces[start + count :]), ""), ""
        parts = joined(own, found.scores[k, row, :count], found.errors[k, row, :count])
        return cls(
            example,
            start,
            start + count + 1,
            float(found.losses[row]),
            float(found.totals[k, row]),
            float(found.total_errors[k, row]),
            parts,
            rest,
        )


class Section(NamedTuple):
    """Windows by title, for one validation set."""

    set: str
    lists: list[tuple[str, list[Window]]]

    def sizes(self) -> np.ndarray:
        """Sizes of all scores."""
        windows = [window for _, own in self.lists for window in own]
        return np.abs([part.score for window in windows for part in window.parts])


class About(NamedTuple):
    """What a reader has to know: the run, and how its texts were scored."""

    run: str
    several_sets: bool
    notes: list[str]

    @classmethod
    def of(cls, source: Run, config: TrainConfig, step: int) -> "About":
        which = f"step {step}" if step < config.steps else "the step that would come next"
        order = "half-way along the update" if config.order == 2 else "at the parameters"
        notes = [
            f"Every text was scored as a row of {which}, with the model and optimizer of "
            f"checkpoint {step}: by how much its share of the update, one of {config.batch_size}, "
            f"lowers the mean loss of {config.val_batch_size} held-out rows, in "
            f"{source.unit}. Positive helps. The update's derivative is that at the "
            f"step's own batch, the validation gradient is taken {order}: as for the scores in "
            "the log. This is one step, where the value of an example sums all its visits, so the "
            "two may differ in sign.",
            "The score of a token is what the uses of the parameters at its position contribute: "
            "reading it, being read by later ones, and predicting the next. The scores of a "
            "window's tokens add up to the score of the window. What follows a score is its "
            "standard error: how much it would vary with other held-out rows.",
        ]
        return cls(source.path.resolve().name, len(source.sets) > 1, notes)


def joined(pieces: Sequence[str], scores: np.ndarray, errors: np.ndarray) -> list[Shown]:
    """Tokens without a piece of their own join the next that has one; scores add up.

    >>> joined(["a", "", "ä", ""], np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4))[1:]
    [Shown(text='ä', position=1, tokens=2, score=5.0, error=None),
     Shown(text='', position=3, tokens=1, score=4.0, error=0.0)]
    """
    shown, first = [], 0
    for n, piece in enumerate(pieces):
        if piece or n == len(pieces) - 1:
            own = slice(first, n + 1)
            count = n + 1 - first
            error = float(errors[n]) if count == 1 else None
            shown.append(Shown(piece, first, count, float(scores[own].sum()), error))
            first = n + 1
    return shown


class Colours(NamedTuple):
    """Levels from -LEVELS to LEVELS for scores; ``top`` and beyond have the strongest."""

    top: float

    @classmethod
    def of(cls, sizes: np.ndarray) -> "Colours":
        return cls(float(np.quantile(sizes, QUANTILE)) if len(sizes) else 0.0)

    def level(self, score: float) -> int:
        """
        >>> Colours(6.0).level(-2.9), Colours(6.0).level(0.4), Colours(6.0).level(100.0)
        (-3, 0, 6)
        """
        size = min(1.0, abs(score) / self.top) if self.top else 0.0
        return round(LEVELS * size) * (1 if score > 0 else -1)


def visible(text: str) -> str:
    """The text with a mark for line ends, and one for what has no look of its own.

    >>> visible("a\\n"), visible("\\u202e")
    ('a↵\\n', '\ufffd')
    """
    lines = [output.plain(line) for line in text.split("\n")]
    return "↵\n".join(lines) or "\ufffd"


def make_page(sections: Sequence[Section], about: About) -> str:
    """The page."""
    sets = [
        {"place": f"v{n}", "heading": f"Validation set {each.set}", **_set(each)}
        for n, each in enumerate(sections, 1)
    ]
    return render(
        "tokens.html",
        title=f"{about.run}: tokens of training documents",
        run=about.run,
        notes=about.notes,
        places={each["place"]: each["heading"] for each in sets},
        heat_style=Markup(_style()),
        sets=sets,
    )


def _style() -> str:
    levels = "\n".join(
        f".heat .{sign}{level} {{ background: color-mix(in srgb, var(--{name}) "
        f"{mixed(level)}%, var(--page)); }}"
        for sign, name in (("p", "helps"), ("m", "hurts"))
        for level in range(1, LEVELS + 1)
    )
    return f"""
.heat {{ font: .95rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; max-width: 60rem; print-color-adjust: exact; }}
.heat span {{ padding: .15em 0; }}
.legend {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem; }}
.legend span {{ padding: .15em .4em; border-radius: .2rem; }}
.window {{ margin: 0 0 1.4rem; }}
.window .head {{ display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: baseline; }}
.heat .m1, .heat .m2, .heat .m3, .heat .m4, .heat .m5, .heat .m6 {{
  text-decoration: underline dotted 1px; text-underline-offset: .25em; }}
{levels}
"""


def mixed(level: int) -> int:
    """Percent of the colour in a level."""
    return round(MIXED * level / LEVELS)


def _set(each: Section) -> dict[str, Any]:
    sizes = each.sizes()
    colours, scale = Colours.of(sizes), Scale.of(np.quantile(sizes, [QUANTILE]))
    legend = scale.within("Score of a token")
    legend += ". The last colours hold beyond, too; underlined tokens hurt."
    levels = [
        (_css(level), scale.signed(colours.top * level / LEVELS))
        for level in range(-LEVELS, LEVELS + 1)
    ]
    lists = [
        (title, [_window(window, colours, scale) for window in windows])
        for title, windows in each.lists
    ]
    return {"legend": legend, "levels": levels, "lists": lists}


def _css(level: int) -> str:
    return f"p{level}" if level > 0 else f"m{-level}" if level else "none"


def _number(score: float, error: float | None, scale: Scale) -> str:
    return scale.signed(score) + (f" ± {scale.plain(error)}" if error is not None else "")


def _window(window: Window, colours: Colours, scale: Scale) -> dict[str, Any]:
    parts = []
    for part in window.parts:
        level = colours.level(part.score)
        several = f" ({part.tokens} tokens)" if part.tokens > 1 else ""
        hover = f"{part.text!r} {_number(part.score, part.error, scale)}{several}"
        parts.append((_css(level) if level else "", hover, _escaped(part.text)))
    if window.rest:
        parts.append(("soft", "only predicted", _escaped(window.rest)))
    rows = [
        (repr(part.text), f"{window.start + part.position}", _number(*part[3:], scale))
        for part in strongest(window)
    ]
    return {
        "id": window.example.id,
        "total": _number(window.total, window.error, scale),
        "where": _where(window),
        "parts": parts,
        "numbers": Table("Tokens with the largest scores", ("token", "place", "score"), rows),
    }


def _escaped(text: str) -> Markup:
    return Markup("\n").join(escape(line) for line in visible(text).split("\n"))


def _where(window: Window) -> str:
    count = window.end - 1 - window.start
    return (
        f"the sum of {count} tokens; {window.example.domain}, tokens {window.start} to "
        f"{window.end - 1} of {window.example.size}, loss {window.loss:.3f}"
    )


def strongest(window: Window) -> list[Shown]:
    """What has the largest scores in a window."""
    return sorted(window.parts, key=lambda part: -abs(part.score))[:STRONGEST]


def print_texts(console: Console, sections: Sequence[Section], about: About) -> None:
    """Prints the texts: coloured where the terminal has colours, with the largest scores listed."""
    for each in sections:
        colours = Colours.of(each.sizes())
        output.print_text(console, f"Validation set {each.set}", "bold")
        legend = Text("score of a token: ")
        for level in (-LEVELS, -LEVELS // 2, 0, LEVELS // 2, LEVELS):
            legend.append(f" {colours.top * level / LEVELS:+.1e} ", _terminal_style(level))
        console.print(legend)
        for title, windows in each.lists:
            console.print()
            output.print_text(console, title, "bold")
            for window in windows:
                _print_window(console, window, colours)
        console.print()
    for note in about.notes:
        output.print_text(console, note, "dim")


def _print_window(console: Console, window: Window, colours: Colours) -> None:
    total = output.with_error(window.total, window.error, console)
    console.print()
    output.print_text(console, f"{window.example.id}  {total}  {_where(window)}", "bold")
    text = Text()
    for part in window.parts:
        shown = output.encodable(visible(part.text), console)
        text.append(shown, _terminal_style(colours.level(part.score)))
    if window.rest:
        text.append(output.encodable(visible(window.rest), console), "dim")
    console.print(text)
    listed = ", ".join(f"{part.text!r} {part.score:+.1e}" for part in strongest(window))
    output.print_text(console, f"largest: {listed}", "dim")


def _terminal_style(level: int) -> Style:
    """Black on a light ground, whatever colours the terminal itself has."""
    if not level:
        return Style.null()
    colour = LIGHT.helps if level > 0 else LIGHT.hurts
    return Style(
        color="#000000", bgcolor=blend(colour, "#ffffff", mixed(abs(level))), underline=level < 0
    )


def blend(colour: str, ground: str, percent: int) -> str:
    """
    >>> blend("#ff0000", "#ffffff", 50)
    '#ff8080'
    """
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(ground[1:]))
    return "#" + bytes(round((percent * a + (100 - percent) * b) / 100) for a, b in pairs).hex()
