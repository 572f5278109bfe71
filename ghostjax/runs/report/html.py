"""HTML of one page: colours and templates. Nothing is loaded, no script but our own is run."""

import base64
import collections
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from markupsafe import escape as _escape

from ghostjax.runs.report.output import plain

# On a light and on a dark page, by use; ``style.css`` has no other
# colours. Each has one meaning: those of lines (s1 to s6) are none of helps and hurts.
_COLOURS = {
    "page": ("#ffffff", "#14171c"),
    "panel": ("#f5f6f8", "#1d2229"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "soft": ("#525a65", "#a7b0bb"),
    "line": ("#d3d8df", "#3a434f"),
    "helps": ("#1f5fbf", "#7fb0ff"),
    "hurts": ("#b3471b", "#ff9a6b"),
    "s1": ("#7a3fa8", "#cf9fff"),
    "s2": ("#00717a", "#4fd0d9"),
    "s3": ("#a01a6e", "#ff8ad0"),
    "s4": ("#5a6472", "#aab4c0"),
    "s5": ("#6b5344", "#c9ab95"),
    "s6": ("#3d4aa0", "#a3b0ff"),
    "good": ("#1b7040", "#6fdc9a"),
    "fair": ("#7d5600", "#f0c45a"),
    "poor": ("#b3261e", "#ff9b91"),
}
Theme = collections.namedtuple("Theme", _COLOURS)
LIGHT, DARK = (Theme(*colours) for colours in zip(*_COLOURS.values()))

SERIES = 6  # colours and dashes for lines


class Table(NamedTuple):
    """A table of texts; the first column names the rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A picture (SVG), what it shows in words, and its numbers; without the others, why not."""

    caption: str
    picture: Markup | None = None
    numbers: Table | None = None


def escape(text: str) -> Markup:
    """Text for any place in HTML, also in quoted attributes; see ``output.plain``.

    >>> escape('<b> & "')
    Markup('&lt;b&gt; &amp; &#34;')
    """
    return _escape(plain(str(text)))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("ghostjax.runs.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    # Every expression of a template passes here, so that no text of the data is forgotten.
    finalize=lambda value: value if hasattr(value, "__html__") else escape(value),
)


def render(template: str, *, run: str, script: str | None = None, **texts: Any) -> str:
    """A whole page on a run, of the templates in ``templates``.

    Its policy forbids to load anything, and to run any script but ``script``, a file there, so that
    an escape that was forgotten does no harm.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script is not None:
        script, _, _ = _TEMPLATES.loader.get_source(_TEMPLATES, script)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return _TEMPLATES.get_template(template).render(
        policy=Markup(policy),
        script=None if script is None else Markup(script),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        version=version("ghostjax"),
        run=run,
        **texts,
    )


def style(theme: Theme) -> str:
    """The style of charts on a ground of their own."""
    rules, _, _ = _TEMPLATES.loader.get_source(_TEMPLATES, "charts.css")
    return f":root {{ {_variables(theme)}}}\n{rules}"


def _variables(theme: Theme) -> str:
    return "".join(f"--{name}: {colour}; " for name, colour in theme._asdict().items())
