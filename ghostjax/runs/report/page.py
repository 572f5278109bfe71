"""A run as one HTML page that needs no network."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ghostjax.fidelity import Fidelity
from ghostjax.runs.analysis.judgement import judge, warnings
from ghostjax.runs.analysis.scale import Scale, number
from ghostjax.runs.analysis.summary import last_loss, measure_fidelity, run_warnings
from ghostjax.runs.analysis.values import (
    Valued,
    best_and_worst,
    both_ends,
    read_values,
)
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report.charts import (
    by_domain,
    by_kind,
    chosen_examples,
    distribution,
    losses,
    over_time,
    predicted_and_actual,
    single_steps,
)
from ghostjax.runs.report.html import Table, render
from ghostjax.runs.report.output import progress_note
from ghostjax.runs.report.windows import Window, Windows
from ghostjax.runs.store.files import ROW_GROUP
from ghostjax.runs.store.run import Run

MAX_LISTED = 250  # of either end, in the table of examples
MAX_UNVISITED = 100
MARKS = {"helps": "▲", "hurts": "▼", "unclear": "●", "few visits": "◦"}
MARKS |= {"no error bar": "?", "not visited": "○"}
_COLOURS = (
    ("helps", MARKS["helps"], "helps: an example by its verdict; else a sum or score above zero"),
    ("hurts", MARKS["hurts"], "hurts: an example by its verdict; else a sum or score below zero"),
    (
        "unclear",
        " ".join(MARKS[verdict] for verdict in ("unclear", "few visits", "no error bar")),
        "unclear, few visits (below 8), or no error bar",
    ),
    ("not", MARKS["not visited"], "not visited: there is no value"),
)
# What a log may lack, and what the page then does not tell.
_OPTIONAL = {
    "predicted": ("steps", "predicted decreases of the loss"),
    "actual": ("steps", "actual decreases of the loss, so predictions cannot be compared with it"),
    "val_loss": ("steps", "losses on the validation set"),
    "conservation_error": ("steps", "certificate"),
    "audit_error": ("steps", "audit"),
    "correlation": ("steps", "correlations with plain inner products"),
    "error": ("scores", "standard errors of the scores, so no example can be told to help or hurt"),
}


def make_report(
    source: Run, count: int = 10, task: TextTask | None = None, note: str | None = None
) -> str:
    """The page, with ``count`` examples of either end per validation set.

    Args:
      task: the data of a run on texts, for the windows that counted most.
      note: what is to be told of the data.

    Raises:
      UsageError: the log holds no visits yet, or a table cannot be read.
    """
    values = read_values(source)
    if not any(valued.visited.any() for valued in values.values()):
        raise UsageError(f"{source.path}: no example was visited so far")
    measured = {which: measure_fidelity(source, which, valued) for which, valued in values.items()}
    name = source.path.resolve().name
    several = len(source.sets) > 1
    headings = {which: f"Validation set {which}" if several else "The values" for which in values}
    places = {"trust": "Can the values be trusted?"}
    places |= {f"v{n}": heading for n, heading in enumerate(headings.values(), 1)}
    windows = Windows(source, task, _shown(values, count))
    sets = [
        {
            "place": f"v{n}",
            "heading": headings[which],
            **_validation_set(source, which, valued, count, f"v{n}", windows),
        }
        for n, (which, valued) in enumerate(values.items(), 1)
    ]
    return render(
        "report.html",
        title=f"{name}: values of training examples",
        run=name,
        script="table.js",
        lead="How much each training example helped or hurt while the model trained, measured by "
        "what its share of every update did to the loss on the validation "
        f"{'sets' if several else 'set'} {', '.join(source.sets)}.",
        notices=[
            *([] if source.is_finished else [progress_note(source)]),
            *([note] if note else []),
        ],
        facts=_facts(source, next(iter(values.values()))),
        places={**places, "about": "The run"},
        judged=_judged(source, measured),
        others=_others(source, measured),
        colours=_COLOURS,
        sets=sets,
        losses=losses(source),
        options=_options(source),
    )


def _facts(source: Run, first: Valued) -> dict[str, str]:
    facts = {"steps": f"{source.end}"}
    if not source.is_finished:
        total = source.metadata.get("options", {}).get("steps")
        facts = {"steps so far": f"{source.end} of {total}" if total else f"{source.end}"}
    facts["training examples"] = f"{len(first)}"
    facts["of them visited"] = f"{first.visited.sum()}"
    facts["not visited, without a value"] = f"{(~first.visited).sum()}"
    known = {"last training loss": source.steps["loss"][-1].as_py()}
    known |= {f"last loss on {which}": last_loss(source, which) for which in source.sets}
    return facts | {what: number(loss) for what, loss in known.items() if loss is not None}


def _judged(source: Run, measured: dict[str, Fidelity]) -> list[tuple[str, Any]]:
    found = []
    for which, fidelity in measured.items():
        judgement = judge(fidelity, source.end, warnings(source, which, fidelity))
        verdict = judgement.verdict
        several = f"{which}: {verdict[0].lower()}{verdict[1:]}"
        found.append((several if len(measured) > 1 else verdict, judgement))
    return found


def _others(source: Run, measured: dict[str, Fidelity]) -> list[str]:
    """Warnings of the summary beside those of the judgement, and what the log lacks."""
    known = run_warnings(source, measured)
    stated = [str(text) for text in (source.summary or {}).get("warnings") or []]
    lacks = [
        f"The log has no {what} for validation set {which}."
        for which in source.sets
        for column, (table, what) in _OPTIONAL.items()
        if column != "audit_error"  # told among what was measured
        and not source.has(table, f"{column}_{which}")
    ]
    return [text for text in stated if text not in known] + lacks


def _validation_set(
    source: Run, which: str, valued: Valued, count: int, place: str, windows: Windows
) -> dict[str, Any]:
    scale = Scale.typical(valued.values)
    ranked = valued.ranked()
    intro = (
        "The value of an example sums, over its visits, the decrease of the loss on "
        f"{which} by its share of the updates, in {source.unit}. Positive values helped, "
        "negative ones hurt. "
    )
    if scale.exponent:
        intro += f"Values are given in units of {scale.words}."
    charts = {
        "Distribution of the values": distribution(place, valued, scale),
        "Values by domain": by_domain(place, valued, scale),
        "Values over training time": over_time(place, source, which),
        "Values of single examples over the steps": chosen_examples(place, source, which, ranked),
        "Predicted and actual decrease": predicted_and_actual(place, source, which),
        "Single steps": single_steps(place, source, which),
        "Share by kind of layer": by_kind(place, source, which),
    }

    def examples(some: Valued, indices: np.ndarray) -> list[dict[str, Any]]:
        own = some.select(indices)
        return _examples(own, indices, scale, [windows.of(which, n) for n in own.ids.places])

    lists = [
        (f"Examples: {title[0].lower()}{title[1:]}", examples(ranked, indices))
        for title, indices in best_and_worst(ranked.values, count)
    ]
    note = f"{scale.within('Value ± its standard error')}."
    listing = _listing(source, valued, examples)
    return {"intro": intro, "charts": charts, "lists": lists, "note": note, "listing": listing}


def _examples(
    shown: Valued, ranks: np.ndarray, scale: Scale, windows: list[Window]
) -> list[dict[str, Any]]:
    rows = zip(ranks, shown.ids, shown.domains, shown.verdicts, windows, strict=True)
    return [
        {
            "rank": int(rank) + 1 if shown.visits[n] else None,
            "id": name,
            "domain": domain,
            "value": scale.signed(shown.values[n]) if shown.visits[n] else "-",
            "error": scale.plain(shown.errors[n]) if shown.has_error[n] else "",
            "exact": _exact(shown.values[n]),
            "exact_error": _exact(shown.errors[n]),
            "visits": int(shown.visits[n]),
            "verdict": verdict,
            "mark": MARKS[verdict],
            "sign": verdict if verdict in ("helps", "hurts") else "unclear",
            "windows": window.words,
            "excerpt": window.text,
        }
        for n, (rank, name, domain, verdict, window) in enumerate(rows)
    ]


def _shown(values: dict[str, Valued], count: int) -> np.ndarray:
    """Which examples the page has: of each validation set those that are listed, a few hundred."""
    found = []
    for valued in values.values():
        ranked = valued.ranked()
        found += [ranked.ids.places[own] for own in both_ends(ranked, max(MAX_LISTED, count))]
        found += [valued.ids.places[_not_visited(valued)]]
        found += [ranked.ids.places[own] for _, own in best_and_worst(ranked.values, count)]
    return np.concatenate(found)


def _not_visited(valued: Valued) -> np.ndarray:
    """Which examples without a visit the page has, the first of them."""
    is_missing, found = ~valued.visited, np.zeros(0, np.int64)
    for start in range(0, len(valued), ROW_GROUP):
        if len(found) >= MAX_UNVISITED:
            break
        own = start + np.flatnonzero(is_missing[start : start + ROW_GROUP])
        found = np.append(found, own)[:MAX_UNVISITED]
    return found


def _listing(
    source: Run, valued: Valued, examples: Callable[[Valued, np.ndarray], list[dict[str, Any]]]
) -> dict[str, Any]:
    """The table of examples: all of them, or both ends of the ranking and some not visited."""
    ranked = valued.ranked()
    first, last = both_ends(ranked, MAX_LISTED)
    some = valued.select(_not_visited(valued))
    rows = examples(ranked, np.concatenate([first, last[::-1]]))
    rows += examples(some, np.arange(len(some)))
    note = f"{len(rows)} of {len(valued)} examples"
    if len(rows) < len(valued):
        note += (
            f": up to {MAX_LISTED} of either end of the ranking and {MAX_UNVISITED} that were not "
            f"visited. Left out are {len(ranked) - len(first) - len(last)} between them and "
            f"{len(valued) - len(ranked) - len(some)} not visited; "
        )
        note += (
            "values.parquet has all of them"
            if source.is_finished
            else "ghostjax rank --csv lists all of them"
        )
    columns = ["rank", "id", "domain", "value", "±", "visits", "verdict", "windows", "excerpt"]
    if not any(row["windows"] for row in rows):
        columns.remove("windows")
    return {"note": f"{note}.", "columns": columns, "rows": rows}


def _options(source: Run) -> Table:
    options = source.metadata.get("options") or (source.summary or {}).get("options") or {}
    rows = [(str(name), _text(value)) for name, value in options.items()]
    seconds = (source.summary or {}).get("seconds")
    if isinstance(seconds, int | float):
        rows.append(("seconds of training", f"{seconds:.1f}"))
    for group in ("versions", "fingerprints"):
        entries = source.metadata.get(group)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            rows.append((f"{name} ({group.rstrip('s')})", _text(value)))
    return Table("Options and versions", ("name", "setting"), rows)


def _exact(value: float) -> str:
    """For the script that sorts; nothing where there is no value."""
    return repr(float(value)) if np.isfinite(value) else ""


def _text(value: Any) -> str:
    """A setting, on one line and not too long."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= 200 else text[:199] + "…"
