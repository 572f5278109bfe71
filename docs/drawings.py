"""Drawings for the pages, made from what the walk finds in a small model."""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure

from ghostjax import explain

COLOURS = {"parameters": "#ffd9b3", "batch": "#cfe3ff", "meeting": "#ffb3b3", "data": "#e8f0fa"}


def loss_fn(params, batch):
    h = jnp.tanh(batch["x"] @ params["in"] + params["bias"])
    return jnp.mean(jnp.square(h @ params["in"].T - batch["x"]))


def small_model():
    """Shapes of parameters and batch: 4 rows, a matrix that is used twice."""
    of = jax.ShapeDtypeStruct
    params = {"in": of((6, 3), jnp.float32), "bias": of((3,), jnp.float32)}
    return params, {"x": of((4, 6), jnp.float32)}


def _box(axes, at, text, kind):
    style = {"boxstyle": "round,pad=0.5", "facecolor": COLOURS[kind], "edgecolor": "#555555"}
    return axes.text(*at, text, ha="center", va="center", fontsize=9, bbox=style)


def _arrow(axes, start, end):
    """From one box to another."""
    style = {"arrowstyle": "-|>", "color": "#555555"}
    patches = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    ends = {"xy": end.get_position(), "xytext": start.get_position()}
    axes.annotate("", **ends, arrowprops={**style, **patches, "shrinkB": 2}, zorder=4)


def walk(path: pathlib.Path) -> None:
    """Parameters above, data below, and where they meet, as ``explain`` finds it."""
    params, batch = small_model()
    uses = explain(loss_fn)(params, batch).uses
    figure = matplotlib.figure.Figure(figsize=(8, 3.6))
    axes = figure.add_subplot()
    axes.set_axis_off()
    order = sorted(uses, key=_line_and_name)
    names = sorted({use.parameter for use in uses})
    above = {
        name: _box(axes, ((k + 1) * 3.0, 2.0), f"params{name}", "parameters")
        for k, name in enumerate(names)
    }
    last = _box(axes, (0.0, 0.0), "batch", "batch")
    for k, use in enumerate(order):
        operation = use.operation.split(" at ")[0]
        text = f"{operation}\nrows: axis {use.row_axis}\n{use.route}"
        meeting = _box(axes, ((k + 1) * 2.6, 0.0), text, "meeting")
        _arrow(axes, above[use.parameter], meeting)
        _arrow(axes, last, meeting)
        last = meeting
    end = ((len(order) + 1) * 2.6, 0.0)
    _arrow(axes, last, _box(axes, end, "loss", "data"))
    axes.set_xlim(-0.8, end[0] + 0.8)
    axes.set_ylim(-0.8, 2.6)
    _save(figure, path)


def _line_and_name(use):
    """In the order of the program: by source line, products before what is added to them."""
    line = int(use.operation.rsplit(":", 1)[-1])
    return line, not use.operation.startswith("dot_general")


def channel(path: pathlib.Path) -> None:
    """One meeting: what goes forward, and what comes back."""
    figure = matplotlib.figure.Figure(figsize=(8, 2.6))
    axes = figure.add_subplot()
    axes.set_axis_off()
    places = {
        "x [B, T, i]": ((0, 1.2), "batch"),
        "W [i, o]": ((0, 0), "parameters"),
        "y = x W": ((2.4, 1.2), "data"),
        "t = x G\nof the direction G": ((2.4, 0), "meeting"),
        "cotangent c of y": ((5, 1.2), "data"),
        "dots[b] = sum of c t\nover positions and features": ((5, 0), "meeting"),
    }
    boxes = [_box(axes, at, text, kind) for text, (at, kind) in places.items()]
    for start, end in ((0, 2), (1, 2), (0, 3), (4, 5), (3, 5)):
        _arrow(axes, boxes[start], boxes[end])
    axes.set_xlim(-0.8, 6.4)
    axes.set_ylim(-0.5, 1.7)
    _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "ghostjax", "svg.fonttype": "none"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def draw(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    walk(folder / "walk.svg")
    channel(folder / "channel.svg")
