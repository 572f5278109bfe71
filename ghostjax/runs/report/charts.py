"""The figures of the report: a chart, what it shows in words, and its numbers as a table."""

from itertools import pairwise

import numpy as np
import pyarrow.compute as pc

from ghostjax.fidelity import far_off, step_weights
from ghostjax.runs.analysis import domains
from ghostjax.runs.analysis.scale import Scale, number
from ghostjax.runs.analysis.statistics import without_sum
from ghostjax.runs.analysis.values import Valued, both_ends
from ghostjax.runs.analysis.visits import scores_by_domain, sums_of_steps
from ghostjax.runs.report import pictures
from ghostjax.runs.report.html import Figure, Table
from ghostjax.runs.report.terminal import standing
from ghostjax.runs.store.run import Run

MAX_DOMAINS = 8  # in a chart; its table has all, up to MAX_ROWS
MAX_LINES = 5  # of single domains; the rest are one line
MAX_POINTS = 60  # of a line
MAX_STEPS = 300  # in the scatter plot
MAX_ROWS = 200  # of a table
BARS = 24
NO_DECREASES = "The log has no predicted and actual decreases of the validation loss."


def distribution(place: str, valued: Valued, scale: Scale) -> Figure:
    """How many examples have which value."""
    ranked = valued.ranked()
    values = scale(ranked.values[np.isfinite(ranked.values)])
    edges = _edges(values)
    verdicts = ranked.verdicts[np.isfinite(ranked.values)]
    is_kind = {kind: verdicts == kind for kind in ("helps", "hurts")}
    # Those without a claim, whatever the reason.
    is_kind["unclear"] = ~(is_kind["helps"] | is_kind["hurts"])
    counts = {
        kind: np.histogram(np.clip(values[own], edges[0], edges[-1]), edges)[0]
        for kind, own in is_kind.items()
    }
    outside = int(((values < edges[0]) | (values > edges[-1])).sum())
    helped, hurt = int((values > 0).sum()), int((values < 0).sum())
    quarters = [number(v) for v in np.quantile(values, [0.25, 0.5, 0.75])]
    caption = (
        f"Of {len(values)} examples that were visited, {helped} helped and {hurt} hurt. The median "
        f"is {quarters[1]}; half of them lie between {quarters[0]} and {quarters[2]}. "
        f"{standing(valued)}"
    )
    if outside:
        caption += f" The outermost bars hold {outside} that lie further out."
    chart = pictures.histogram(
        f"{place}-distribution",
        "Distribution of the values",
        caption,
        edges,
        counts,
        scale.label("value"),
    )
    rows = [
        (f"{number(a)} to {number(b)}", *map(str, own))
        for a, b, *own in zip(edges, edges[1:], *counts.values())
    ]
    columns = (scale.label("value"), "helps", "hurts", "unclear, few visits or no error bar")
    return Figure(caption, chart, Table("Examples by value", columns, rows))


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of bars of a round width, with one at zero; a few far out values do not stretch it."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    first, third = np.quantile(values, [0.25, 0.75])
    if third > first:  # five standard deviations of a normal distribution
        room = 4 * (third - first)
        low, high = max(low, min(first - room, 0.0)), min(high, max(third + room, 0.0))
    if not high > low:
        low, high = -1.0, 1.0
    marks = pictures.ticks(low, high, BARS)
    width = marks[1] - marks[0] if len(marks) > 1 else high - low
    first, last = np.floor(low / width + 1e-9), np.ceil(high / width - 1e-9)
    return np.arange(first, max(last, first + 1) + 1) * width


def by_domain(place: str, valued: Valued, scale: Scale) -> Figure:
    """The range of the values in each domain."""
    found = domains.by_domain(valued)
    named = chosen = [one for one in found if len(one.measured)]
    if len(named) > MAX_DOMAINS:
        half = MAX_DOMAINS // 2
        chosen = named[:half] + named[-half:]
    best, worst = (f"{one.name} ({scale.number(one.mean)})" for one in (named[0], named[-1]))
    caption = (
        f"The domain with the highest mean is {best}"
        + (f", that with the lowest {worst}" if len(named) > 1 else "")
        + ". The line spans 90% of a domain's examples, the bar half of them; the mark is the "
        "median."
    )
    if chosen is not named:
        caption += f" Of {len(named)} domains, the highest and lowest {half} are drawn."
    chart = pictures.ranges(
        f"{place}-domains",
        "Values by domain",
        caption,
        {
            one.name: np.quantile(scale(one.measured), [0.05, 0.25, 0.5, 0.75, 0.95])
            for one in chosen
        },
        scale.label("value"),
    )
    columns = ("domain", "examples", "visits", "sum", "mean", "median", "helped")
    what = scale.within("Values by domain")
    if len(found) > MAX_ROWS:
        half = MAX_ROWS // 2
        found = found[:half] + found[-half:]
        what += f" (highest and lowest {half})"
    rows = [
        (
            one.name,
            f"{one.examples}",
            f"{one.visits}",
            *(
                scale.number(figure) if len(one.measured) else "-"
                for figure in (one.total, one.mean, one.median)
            ),
            f"{one.helped:.0%}" if len(one.measured) else "-",
        )
        for one in found
    ]
    return Figure(caption, chart, Table(what, columns, rows))


def over_time(place: str, source: Run, which: str) -> Figure:
    """The mean score of a visit, by domain, over the steps."""
    bins = _bins(source.end, 20)
    centers = (bins[:-1] + bins[1:] - 1) / 2
    names, sums, counts, of_steps = scores_by_domain(source, which, bins)
    some = len(names) if len(names) <= MAX_LINES + 1 else MAX_LINES
    lines = {name: _mean(sums[n], counts[n]) for n, name in enumerate(names[:some])}
    if some < len(names):
        lines["all others"] = _mean(sums[some:].sum(0), counts[some:].sum(0))
    scale = Scale.of(np.concatenate(list(lines.values())))
    first, last = _ends(_mean(sums.sum(0), counts.sum(0)))
    caption = (
        "How much one visit of an example helped, on average over the visits of a stretch of "
        f"steps. Over all examples it was {scale.plain(first)} in the first stretch and "
        f"{scale.plain(last)} in the last{f' ({scale.words})' if scale.words else ''}."
    )
    if share := without_sum(*of_steps):
        caption += (
            f" In {share:.0%} of the steps the scores add up to 0, as they do where an optimizer "
            "clips the gradient's norm: they compare the rows of such a step, and do not tell "
            "whether all of them together lowered the loss."
        )
    chart = pictures.lines(
        f"{place}-time",
        "Values over training time",
        caption,
        {name: (centers, scale(means)) for name, means in lines.items()},
        "step",
        scale.label("mean score of a visit"),
    )
    rows = [
        (_stretch(a, b), *(scale.number(means[n]) for means in lines.values()))
        for n, (a, b) in enumerate(pairwise(bins))
    ]
    what = scale.within("Mean score of a visit")
    return Figure(caption, chart, Table(what, ("steps", *lines), rows))


def chosen_examples(place: str, source: Run, which: str, ranked: Valued) -> Figure:
    """How the values of the examples of either end came about, visit by visit."""
    ends = ranked.select(np.concatenate(both_ends(ranked, pictures.SERIES // 2)))
    sums = sums_of_steps(source, which, ends.ids.places)
    at = np.unique(np.linspace(0, source.end - 1, min(MAX_POINTS, source.end)).round().astype(int))
    lines = {name: np.cumsum(own)[at] for name, own in zip(ends.ids, sums)}
    scale = Scale.of(np.concatenate(list(lines.values())))
    caption = (
        "What the visits up to a step add up to, for the most helpful and the most harmful "
        "examples: a value that one visit made is a single step of the line."
    )
    drawn = {name: (at, scale(values)) for name, values in lines.items()}
    chart = pictures.lines(
        f"{place}-examples",
        "Values of single examples over the steps",
        caption,
        drawn,
        "step",
        scale.label("value up to the step"),
    )
    rows = [
        (f"{step}", *(scale.number(values[n]) for values in lines.values()))
        for n, step in enumerate(at)
    ]
    what = scale.within("Value up to the step")
    return Figure(caption, chart, Table(what, ("step", *lines), rows))


def predicted_and_actual(place: str, source: Run, which: str) -> Figure:
    """What the updates were predicted to do to the loss and what it did, summed up to each step."""
    steps, predicted, actual = _decreases(source, which)
    if not len(steps):
        return Figure(NO_DECREASES)
    sums = {"predicted": np.cumsum(predicted), "actual": np.cumsum(actual)}
    at = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    caption = (
        f"All in all, the updates were predicted to {_verb(predicted.sum())[0]} the loss on "
        f"{which} by {number(abs(predicted.sum()))}; they {_verb(actual.sum())[1]} it by "
        f"{number(abs(actual.sum()))} ({_measured_on(source)}, in {source.unit})."
    )
    column = f"score_{which}"
    scored = sum(float(np.nansum(some[column])) for some in source.visits(column))
    if abs(scored - predicted.sum()) > 0.1 * abs(predicted.sum()):
        caption += (
            f" The scores add up to {number(scored)}: they are of all validation rows, and of what "
            "the rows of a step change of its update; the rest of the update is what the optimizer "
            "remembers of earlier steps or does without any gradient."
        )
    scale = Scale.of(np.concatenate(list(sums.values())))
    chart = pictures.lines(
        f"{place}-decrease",
        "Predicted and actual decrease of the loss, summed over the steps",
        caption,
        {name: (steps[at], scale(values)[at]) for name, values in sums.items()},
        "step",
        scale.label("decrease up to the step"),
    )
    rows = [(f"{steps[n]}", *(scale.number(own[n]) for own in sums.values())) for n in at]
    what = scale.within("Decrease up to the step")
    return Figure(caption, chart, Table(what, ("step", *sums), rows))


def single_steps(place: str, source: Run, which: str) -> Figure:
    """Predicted and actual decrease of each step."""
    steps, predicted, actual = _decreases(source, which)
    if not len(steps):
        return Figure(NO_DECREASES)
    at = np.unique(np.linspace(0, len(steps) - 1, MAX_STEPS).round().astype(int))
    within = float((np.sign(predicted) == np.sign(actual)).mean())
    selection = "" if len(at) == len(steps) else f" (a selection of {len(at)})"
    caption = (
        f"One point per scored step{selection}. On the dashed line, the prediction is exact. In "
        f"{within:.0%} of the steps, the loss moved the way that was predicted."
    )
    is_off, weights = far_off(predicted, actual), step_weights(predicted, actual)
    if is_off.any() or (weights < 1).any():
        caption += (
            f" {is_off.sum()} steps were far off their prediction, drawn as rings; the scores of "
            f"{(weights < 1).sum()} count less than in full."
        )
    at = np.union1d(at, np.argsort(weights, kind="stable")[:MAX_STEPS][: (weights < 1).sum()])
    at = np.union1d(at, np.flatnonzero(is_off)[:MAX_STEPS])
    scale = Scale.of(np.concatenate([predicted[at], actual[at]]))
    chart = pictures.scatter(
        f"{place}-steps",
        "Predicted and actual decrease of single steps",
        caption,
        scale(predicted)[at],
        scale(actual)[at],
        is_off[at],
        scale.label("predicted decrease"),
        scale.label("actual decrease"),
    )
    some = np.union1d(at[:: max(1, -(-len(at) // MAX_POINTS))], at[is_off[at] | (weights[at] < 1)])
    rows = [
        (
            f"{steps[n]}",
            scale.number(predicted[n]),
            scale.number(actual[n]),
            number(weights[n], 2),
            "far off" if is_off[n] else "",
        )
        for n in some
    ]
    what = scale.within("Decrease of single steps")
    return Figure(caption, chart, Table(what, ("step", "predicted", "actual", "weight", ""), rows))


def by_kind(place: str, source: Run, which: str) -> Figure:
    """How much of the scores the parameters of each kind of layer carry."""
    own = source.kinds.filter(pc.equal(source.kinds["set"], which))
    found = own.group_by("kind", use_threads=False).aggregate([("score", "sum")])
    sums = dict(zip(found["kind"].to_pylist(), found["score_sum"].to_pylist()))
    whole = sum(map(abs, sums.values()))
    if not whole:
        return Figure("The log has no scores by kind of layer.")
    order = sorted(sums, key=lambda kind: -abs(sums[kind]))
    shares = {kind: f"{abs(sums[kind]) / whole:.0%}" for kind in order}
    against = [kind for kind in order if sums[kind] < 0]
    caption = (
        "Of the size of the scores, the parameters of these kinds of layers carry: "
        + ", ".join(f"{kind} {share}" for kind, share in shares.items())
        + " (shares of the sum of their sizes)."
    )
    if against:
        caption += f" The sum is negative for {', '.join(against)}."
    scale = Scale.of(np.array(list(sums.values())))
    chart = pictures.bars(
        f"{place}-kinds",
        "Share of the scores by kind of layer",
        caption,
        {kind: (float(scale(sums[kind])), shares[kind]) for kind in order},
        scale.label("summed score"),
    )
    cells = [(kind, scale.number(sums[kind]), shares[kind]) for kind in order]
    columns = ("kind of layer", scale.label("summed score"), "share")
    return Figure(caption, chart, Table("Scores by kind of layer", columns, cells))


def losses(source: Run) -> Figure:
    """Training and validation losses over the steps."""
    bins = _bins(source.end, MAX_POINTS)
    centers = (bins[:-1] + bins[1:] - 1) / 2
    steps = np.arange(source.end)
    columns = {"training": "loss"}
    columns |= {f"validation: {name}": f"val_loss_{name}" for name in source.sets}
    series = {
        name: _means(steps, source.numbers("steps", column), bins, np.ones(source.end, bool))
        for name, column in columns.items()
    }
    series = {name: means for name, means in series.items() if np.isfinite(means).any()}
    if not series:
        return Figure("The log has no losses.")
    if len(series) > pictures.SERIES:
        series = dict(list(series.items())[: pictures.SERIES])
    order = (source.metadata.get("options") or {}).get("order")
    when = _ORDERS.get(order, "as each step found them")
    caption = (
        "; ".join(
            "{} loss from {} to {}".format(name, *map(number, _ends(values)))
            for name, values in series.items()
        )
        + f" (in {source.unit}, {when})."
    )
    caption = caption[0].upper() + caption[1:]
    drawn = {name: (centers, values) for name, values in series.items()}
    chart = pictures.lines("losses", "Losses", caption, drawn, "step", "loss", zero=False)
    rows = [
        (_stretch(a, b), *(number(values[n]) for values in series.values()))
        for n, (a, b) in enumerate(pairwise(bins))
    ]
    return Figure(caption, chart, Table("Mean losses", ("steps", *series), rows))


_ORDERS = {
    1: "before each step's update",
    2: "before each step's update; on validation sets, half-way along it",
}


def _measured_on(source: Run) -> str:
    if "val_batch_size" not in (source.metadata.get("options") or {}):
        return "on the validation rows of each step"
    return "on those of each step's validation rows for which most is predicted, a quarter or half"


def _verb(decrease: float) -> tuple[str, str]:
    return ("lower", "lowered") if decrease >= 0 else ("raise", "raised")


def _decreases(source: Run, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every step its number, predicted and actual decrease, where both are known."""
    predicted, actual = (
        source.numbers("steps", f"{name}_{which}") for name in ("predicted", "actual")
    )
    steps = np.flatnonzero(np.isfinite(predicted) & np.isfinite(actual))
    return steps, predicted[steps], actual[steps]


def _bins(end: int, most: int) -> np.ndarray:
    """Edges of at most so many stretches of the steps from 0 to ``end``."""
    return np.unique(np.linspace(0, end, min(most, end) + 1).round().astype(int))


def _means(steps: np.ndarray, values: np.ndarray, bins: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean within each stretch, NaN where there is nothing."""
    mask = mask & np.isfinite(values)
    place = np.searchsorted(bins, steps[mask], side="right") - 1
    counts = np.bincount(place, minlength=len(bins) - 1)
    sums = np.bincount(place, values[mask], len(bins) - 1)
    return _mean(sums, counts)


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _ends(means: np.ndarray) -> tuple[float, float]:
    """The first and the last that there is."""
    known = means[np.isfinite(means)]
    return (float(known[0]), float(known[-1])) if len(known) else (np.nan, np.nan)


def _stretch(first: int, end: int) -> str:
    return f"{first}" if end == first + 1 else f"{first} to {end - 1}"
