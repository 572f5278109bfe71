"""Charts as SVG: text alone, with colours from the page's style and a title and description each.

They are drawn in units that are about a CSS pixel on a phone and somewhat more on a wide screen.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from ghostjax.runs.analysis.scale import number
from ghostjax.runs.report.html import SERIES, escape

WIDTH = 400
_LEFT, _RIGHT, _PLOT = 46, 390, 190  # of the plot: its edges and its height
_LETTER = 7.4  # width of a letter in the wider of the usual fonts, for what has to fit


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers within the range, at equal distances.

    >>> ticks(-0.3, 1.1)
    [0.0, 0.5, 1.0]
    """
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    while (high - low) / step > count:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _labels(values: Sequence[float]) -> list[str]:
    """The ticks as texts, with as many places as their distance needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1
    places = 0
    while places < 9 and abs(round(step, places) - step) > 1e-6 * step:
        places += 1
    if places > 4:
        return [number(value, 2) for value in values]
    return [f"{value + 0.0:.{places}f}".replace("-", "\u2212") for value in values]


def _span(values: np.ndarray, *, zero: bool) -> tuple[float, float]:
    """A range that holds the values, with a little room."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        room = abs(high) / 2 or 1.0
        return low - room, high + room
    room = 0.04 * (high - low)
    return low - room * (low != 0 or not zero), high + room * (high != 0 or not zero)


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _svg(name: str, title: str, description: str, height: float, parts: Sequence[str]) -> Markup:
    body = "\n".join(parts)
    return Markup(f"""<svg viewBox="0 0 {WIDTH} {height:g}" role="img" \
aria-labelledby="{name}-title {name}-desc" xmlns="http://www.w3.org/2000/svg">
<title id="{name}-title">{escape(title)}</title>
<desc id="{name}-desc">{escape(description)}</desc>
{body}
</svg>""")


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, style: str = "rule") -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _x_axis(
    low: float, high: float, x, top: float, bottom: float, label: str, *, whole: bool = False
) -> list[str]:
    values = [value for value in ticks(low, high) if not whole or value == round(value)]
    parts = [_rule(x(v), top, x(v), bottom, "zero" if v == 0 else "rule") for v in values]
    parts += [
        _text(_within(x(v), len(t) * _LETTER / 2), bottom + 16, t, "middle")
        for v, t in zip(values, _labels(values))
    ]
    return [*parts, _text(_RIGHT, bottom + 33, label, "end")]


def _within(middle: float, half: float) -> float:
    """Where something of that half width is to be, not to reach beyond the picture."""
    return min(max(middle, half), WIDTH - half)


def _y_axis(low: float, high: float, y, label: str, top: float, whole: bool = False) -> list[str]:
    values = [value for value in ticks(low, high) if not whole or value == round(value)]
    parts = [_rule(_LEFT, y(v), _RIGHT, y(v), "zero" if v == 0 else "rule") for v in values]
    parts += [_text(_LEFT - 6, y(v) + 4, t, "end") for v, t in zip(values, _labels(values))]
    return [*parts, _text(2, top - 10, label)]


def histogram(
    name: str,
    title: str,
    description: str,
    edges: np.ndarray,
    counts: Mapping[str, np.ndarray],
    label: str,
) -> Markup:
    """Counts [n] between edges [n + 1], one above the other, by the name of their colour."""
    top, bottom = 26, 26 + _PLOT
    x = _scale(edges[0], edges[-1], _LEFT, _RIGHT)
    most = max(1.0, float(sum(counts.values()).max())) * 1.05
    y = _scale(0, most, bottom, top)
    parts = _x_axis(edges[0], edges[-1], x, top, bottom, label)
    parts += _y_axis(0, most, y, "examples", top, whole=True)
    below = np.zeros(len(edges) - 1)
    for kind, own in counts.items():
        for left, right, low, count in zip(edges, edges[1:], below, own):
            if count:
                width = max(x(right) - x(left) - 1, 0.5)
                parts.append(
                    f'<rect class="fill-{kind}" x="{x(left) + 0.5:.1f}" y="{y(low + count):.1f}" '
                    f'width="{width:.1f}" height="{y(low) - y(low + count):.1f}"/>'
                )
        below = below + own
    return _svg(name, title, description, bottom + 40, parts)


def ranges(
    name: str, title: str, description: str, rows: Mapping[str, Sequence[float]], label: str
) -> Markup:
    """For each row five numbers: a thin line from the first to the last, a bar between the second
    and the fourth, a mark at the third. Rows whose mark is negative have the colour of harm."""
    low, high = _span(np.array([*rows.values()]), zero=True)
    top, bottom = 4, 4 + 40 * len(rows)
    x = _scale(low, high, 8, _RIGHT)
    parts = _x_axis(low, high, x, top, bottom, label)
    for n, (row, values) in enumerate(rows.items()):
        kind = "helps" if values[2] >= 0 else "hurts"
        first, left, middle, right, last = map(x, values)
        center = top + 40 * n + 28
        parts += [
            _text(8, center - 13, _shorten(row), style="strong"),
            _rule(first, center, last, center, f"whisker whisker-{kind}"),
            f'<rect class="fill-{kind}" x="{left:.1f}" y="{center - 6:.1f}" '
            f'width="{max(right - left, 1):.1f}" height="12"/>',
            _rule(middle, center - 9, middle, center + 9, "mark"),
        ]
    return _svg(name, title, description, bottom + 40, parts)


def bars(
    name: str,
    title: str,
    description: str,
    rows: Mapping[str, tuple[float, str]],
    label: str,
) -> Markup:
    """A bar from zero and a text for each row."""
    low, high = _span(np.array([value for value, _ in rows.values()]), zero=True)
    top, bottom = 4, 4 + 40 * len(rows)
    x = _scale(low, high, 8, _RIGHT)
    parts = _x_axis(low, high, x, top, bottom, label)
    for n, (row, (value, text)) in enumerate(rows.items()):
        left, right = sorted((x(0), x(value)))
        center = top + 40 * n + 28
        parts += [
            _text(14, center - 13, _shorten(row, len(text)), style="strong"),
            _text(_RIGHT, center - 13, text, "end", "strong"),
            f'<rect class="fill-{"helps" if value >= 0 else "hurts"}" x="{left:.1f}" '
            f'y="{center - 7:.1f}" width="{max(right - left, 1):.1f}" height="14"/>',
        ]
    return _svg(name, title, description, bottom + 40, parts)


def lines(
    name: str,
    title: str,
    description: str,
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    x_label: str,
    y_label: str,
    *,
    zero: bool = True,
) -> Markup:
    """Up to six lines over steps, by name: (x [n], y [n]); ``zero`` keeps zero in the plot."""
    legend, rows = _legend(list(series)[:SERIES])
    top = 30 + 20 * rows
    bottom = top + _PLOT
    every_x = np.concatenate([xs for xs, _ in series.values()]).astype(float)
    low, high = _span(np.concatenate([ys for _, ys in series.values()]), zero=zero)
    first, last = float(every_x.min()), float(every_x.max())
    if first == last:
        first, last = first - 0.5, last + 0.5
    x, y = _scale(first, last, _LEFT, _RIGHT), _scale(low, high, bottom, top)
    parts = [*legend, *_x_axis(first, last, x, top, bottom, x_label, whole=True)]
    parts += _y_axis(low, high, y, y_label, top)
    for n, (xs, ys) in enumerate(list(series.values())[:SERIES]):
        keep = np.isfinite(ys)
        points = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(xs[keep], ys[keep])]
        if len(points) == 1:  # a path of one point is invisible
            points = [f"{_LEFT} {points[0].split()[1]}", f"{_RIGHT} {points[0].split()[1]}"]
        parts.append(f'<path class="line s{n + 1}" d="M {" L ".join(points)}"/>' if points else "")
    return _svg(name, title, description, bottom + 40, parts)


def scatter(
    name: str,
    title: str,
    description: str,
    xs: np.ndarray,
    ys: np.ndarray,
    marked: np.ndarray,
    x_label: str,
    y_label: str,
) -> Markup:
    """Points, and the line on which both of their numbers are equal; ``marked`` ones are rings."""
    top, bottom = 26, 26 + _PLOT
    x_low, x_high = _span(xs, zero=True)
    y_low, y_high = _span(ys, zero=True)
    x, y = _scale(x_low, x_high, _LEFT, _RIGHT), _scale(y_low, y_high, bottom, top)
    parts = _x_axis(x_low, x_high, x, top, bottom, x_label)
    parts += _y_axis(y_low, y_high, y, y_label, top)
    low, high = max(x_low, y_low), min(x_high, y_high)
    parts.append(_rule(x(low), y(low), x(high), y(high), "tie"))
    parts += [
        f'<circle class="{"off" if ring else "dot"}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>'
        for a, b, ring in zip(xs, ys, marked)
    ]
    return _svg(name, title, description, bottom + 40, parts)


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Samples of the lines with their names, in as many rows as they need."""
    parts, left, row = [], 2.0, 0
    for n, name in enumerate(names):
        name = _shorten(name, 8)
        width = 34 + _LETTER * len(name)
        if left + width > WIDTH and left > 2:
            left, row = 2.0, row + 1
        y = 12 + 20 * row
        parts.append(_rule(left, y - 4, left + 24, y - 4, f"line s{n + 1}"))
        parts.append(_text(left + 29, y, name, style="strong"))
        left += width + 12
    return parts, row + 1


def _shorten(text: str, taken: int = 0) -> str:
    """A text in a line of which so many letters are taken; without its middle, if it must be.

    >>> _shorten("a" * 40 + "b" * 60, 30)
    'aaaaaaaaaaa…bbbbbbbbbbb'
    """
    room = int(WIDTH / _LETTER) - taken - 1
    half = (room - 1) // 2
    return text if len(text) <= room else f"{text[:half]}\u2026{text[-half:]}"
