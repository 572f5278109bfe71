"""HTML of one page: its style, its tables and figures. Nothing is loaded and nothing is run."""

import collections
import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from ghostjax.runs.report.output import plain

# On a light and on a dark page, by use; ``_CSS`` has no other colours.
_COLOURS = {
    "page": ("#ffffff", "#14171c"),
    "panel": ("#f5f6f8", "#1d2229"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "soft": ("#525a65", "#a7b0bb"),
    "line": ("#d3d8df", "#3a434f"),
    "helps": ("#1f5fbf", "#7fb0ff"),
    "hurts": ("#b3471b", "#ff9a6b"),
    "s1": ("#1f5fbf", "#7fb0ff"),
    "s2": ("#b3471b", "#ff9a6b"),
    "s3": ("#1b7a50", "#5fd39a"),
    "s4": ("#7a3fa8", "#cf9fff"),
    "s5": ("#806200", "#e3c04f"),
    "s6": ("#5a6472", "#aab4c0"),
    "good": ("#1b7040", "#6fdc9a"),
    "fair": ("#7d5600", "#f0c45a"),
    "poor": ("#b3261e", "#ff9b91"),
}
Theme = collections.namedtuple("Theme", _COLOURS)
LIGHT, DARK = (Theme(*colours) for colours in zip(*_COLOURS.values()))

SERIES = 6  # colours and dashes for lines

_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, body > header, body > footer { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
body > header { padding-top: 1.5rem; }
body > footer { padding-bottom: 2rem; color: var(--soft); font-size: .9rem; }
h1, h2, h3 { line-height: 1.25; margin: 1.8rem 0 .6rem; }
h1 { font-size: 1.7rem; margin-top: 0; }
h2 { font-size: 1.35rem; border-top: 1px solid var(--line); padding-top: 1.4rem; }
h3 { font-size: 1.1rem; }
p, li { max-width: 44rem; }
p { margin: .5rem 0; }
a { color: var(--s1); }
.soft, figcaption { color: var(--soft); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
nav a { display: inline-block; padding: .25rem 0; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr));
  gap: .6rem; margin: 1rem 0; }
dl.facts div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem;
  display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dl.facts dt { color: var(--soft); font-size: .85rem; }
dl.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.verdict { background: var(--panel); border-left: .35rem solid var(--soft);
  border-radius: .3rem; padding: .7rem 1rem; margin: 1rem 0; }
.verdict h3, .verdict p, .verdict ul { margin: .2rem 0; }
.verdict ul { padding-left: 1.2rem; }
.good { border-color: var(--good); } .good h3 { color: var(--good); }
.fair { border-color: var(--fair); } .fair h3 { color: var(--fair); }
.poor { border-color: var(--poor); } .poor h3 { color: var(--poor); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 0 2rem; align-items: start; }
.grid > section { min-width: 0; }
figure { margin: 0 0 1rem; max-width: 36rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .95rem; max-width: 44rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }
.scroll { overflow-x: auto; max-height: 24rem; overflow-y: auto; }
table { border-collapse: collapse; overflow-wrap: normal; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; min-width: 6.5rem; max-width: 16rem;
  overflow-wrap: anywhere; }
ol.examples { list-style: none; padding: 0; margin: .5rem 0; }
ol.examples li { background: var(--panel); border-left: .3rem solid var(--soft);
  border-radius: .3rem; padding: .5rem .8rem; margin: 0 0 .6rem; }
ol.examples li.helps { border-color: var(--helps); }
ol.examples li.hurts { border-color: var(--hurts); }
.examples .head { display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: baseline; }
.examples .number { font-weight: 650; font-variant-numeric: tabular-nums; }
.helps .number { color: var(--helps); } .hurts .number { color: var(--hurts); }
.examples .excerpt { margin: .2rem 0 0; font: .85rem/1.45 ui-monospace, "SF Mono", Menlo,
  Consolas, monospace; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  fill: var(--soft); paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg text.strong { fill: var(--ink); }
svg .rule { stroke: var(--line); stroke-width: 1; fill: none; }
svg .zero { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .tie { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 4; fill: none; }
svg .mark { stroke: var(--ink); stroke-width: 2; }
svg .fill-helps { fill: var(--helps); } svg .fill-hurts { fill: var(--hurts); }
svg .whisker { stroke-width: 2; }
svg .whisker-helps { stroke: var(--helps); } svg .whisker-hurts { stroke: var(--hurts); }
svg .dot { fill: var(--s1); fill-opacity: .75; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: butt; }
.s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); stroke-dasharray: 7 3; }
.s3 { stroke: var(--s3); stroke-dasharray: 2 2; }
.s4 { stroke: var(--s4); stroke-dasharray: 10 3 2 3; }
.s5 { stroke: var(--s5); stroke-dasharray: 12 4; }
.s6 { stroke: var(--s6); stroke-dasharray: 1 4; }
@media print { details { display: none; } .verdict, figure, li { break-inside: avoid; } }
"""


def _variables(theme: Theme) -> str:
    return "".join(f"--{name}: {colour}; " for name, colour in theme._asdict().items())


def escape(text: str) -> str:
    """Text for any place in HTML, also in quoted attributes; see ``output.plain``.

    >>> escape('<b> & "')
    '&lt;b&gt; &amp; &quot;'
    """
    return html.escape(plain(text), quote=True)


def document(title: str, header: str, main: str, run: str, style: str = "") -> str:
    """A whole page on a run. ``header`` and ``main`` are HTML, ``style`` is CSS beyond that of all
    pages, the others are text.

    Its policy forbids to load or run anything, so that an escape that was forgotten does no harm.
    """
    written = f"Written by ghostjax {version('ghostjax')} from the run directory {run}."
    style = (
        f":root {{ color-scheme: light dark; {_variables(LIGHT)}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)}}} }}{_CSS}{style}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}
</main>
<footer>
{paragraph(written)}
</footer>
</body>
</html>
"""


def contents(places: Mapping[str, str]) -> str:
    """Links to parts of the page, whose ids have titles."""
    links = "".join(f'<li><a href="#{place}">{escape(to)}</a></li>' for place, to in places.items())
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, in a box of its own that scrolls; the first column names the rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"""<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">
<table>
<caption>{escape(caption)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def figure(picture: str, caption: str, figures: str) -> str:
    """A picture (SVG), what it shows in words (text), and its numbers (HTML), folded away."""
    return f"""<figure>
{picture}
<figcaption>{escape(caption)}</figcaption>
<details>
<summary>The numbers of this picture</summary>
{figures}
</details>
</figure>"""


def section(heading: str, body: str, level: int = 3) -> str:
    """A section with its heading (text) and body (HTML)."""
    return f"<section>\n<h{level}>{escape(heading)}</h{level}>\n{body}\n</section>"


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in sentences) + "\n</ul>"
