"""A run as one HTML page that needs neither network nor script."""

from typing import Any

from ghostjax.fidelity import Fidelity
from ghostjax.runs.analysis.judgement import judge, warnings
from ghostjax.runs.analysis.scale import Scale, number
from ghostjax.runs.analysis.summary import last_loss, measure_fidelity, run_warnings
from ghostjax.runs.analysis.values import (
    Valued,
    best_and_worst,
    read_values,
)
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report.charts import (
    by_domain,
    by_kind,
    distribution,
    losses,
    over_time,
    predicted_and_actual,
    single_steps,
)
from ghostjax.runs.report.html import bullets, contents, document, escape, paragraph, section, table
from ghostjax.runs.report.output import progress_note
from ghostjax.runs.store.run import Run


def make_report(source: Run, count: int = 10) -> str:
    """The page, with ``count`` examples of either end per validation set.

    Raises:
      UsageError: the log holds no visits yet, or a table cannot be read.
    """
    values = read_values(source)
    if not any(valued.visited.any() for valued in values.values()):
        raise UsageError(f"{source.path}: no example was visited so far")
    name = source.path.resolve().name
    measured = {which: measure_fidelity(source, which, valued) for which, valued in values.items()}
    main = [_trust(source, measured)]
    main += [
        _validation_set(source, which, valued, count, f"v{n}")
        for n, (which, valued) in enumerate(values.items(), 1)
    ]
    main.append(_about(source))
    return document(
        title=f"{name}: values of training examples",
        header=_header(source, name, values),
        main="\n".join(main),
        run=name,
    )


def _header(source: Run, name: str, values: dict[str, Valued]) -> str:
    first = next(iter(values.values()))
    sets = ", ".join(source.sets)
    lead = (
        "How much each training example helped or hurt while the model trained, measured by what "
        "its share of every update did to the loss on the validation "
        f"{'sets' if len(source.sets) > 1 else 'set'} {sets}."
    )
    facts = {"steps": f"{source.end}"}
    if not source.is_finished:
        total = source.metadata.get("options", {}).get("steps")
        facts["steps so far"] = f"{facts.pop('steps')} of {total}" if total else f"{source.end}"
    facts["training examples"] = f"{len(first)}"
    facts["of them visited"] = f"{first.visited.sum()}"
    facts["not visited, without a value"] = f"{(~first.visited).sum()}"
    training_loss = source.steps["loss"][-1].as_py()
    if training_loss is not None:
        facts["last training loss"] = number(training_loss)
    for which in source.sets:
        loss = last_loss(source, which)
        if loss is not None:
            facts[f"last loss on {which}"] = number(loss)
    places = {"trust": "Can the values be trusted?"}
    for n, which in enumerate(source.sets, 1):
        places[f"v{n}"] = f"Validation set {which}" if len(source.sets) > 1 else "The values"
    places["about"] = "The run"
    notice = "" if source.is_finished else paragraph(progress_note(source))
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd></div>"
        for what, figure in facts.items()
    )
    return (
        f"<h1>{escape(name)}</h1>\n{paragraph(lead)}\n{notice}\n"
        f'<dl class="facts">{cells}</dl>\n{contents(places)}'
    )


def _trust(source: Run, measured: dict[str, Fidelity]) -> str:
    judged = {
        which: judge(fidelity, source.end, warnings(source, which, fidelity))
        for which, fidelity in measured.items()
    }
    boxes = []
    for which, judgement in judged.items():
        heading = judgement.verdict
        if len(judged) > 1:
            heading = f"{which}: {heading[0].lower()}{heading[1:]}"
        reasons = bullets(judgement.reasons) if judgement.reasons else ""
        boxes.append(
            f'<section class="verdict {judgement.level}">\n<h3>{escape(heading)}</h3>\n{reasons}\n'
            f"<details{' open' if len(judged) <= 4 else ''}><summary>What was measured</summary>\n"
            f"{bullets(judgement.findings)}\n</details>\n</section>"
        )
    # The summary has the same warnings, and may have others.
    judged_already = run_warnings(source, measured)
    stated = [str(text) for text in (source.summary or {}).get("warnings") or []]
    others = [text for text in stated if text not in judged_already]
    body = f'<div class="grid">\n{chr(10).join(boxes)}\n</div>' + (
        bullets(others) if others else ""
    )
    return f'<section id="trust">\n<h2>Can the values be trusted?</h2>\n{body}\n</section>'


def _validation_set(source: Run, which: str, valued: Valued, count: int, place: str) -> str:
    scale = Scale.typical(valued.values)
    ranked = valued.ranked()
    several = len(source.sets) > 1
    heading = f"Validation set {which}" if several else "The values"
    intro = (
        "The value of an example sums, over its visits, the decrease of the loss on "
        f"{which} by its share of the updates, in {source.unit}. Positive values helped, "
        "negative ones hurt. "
    )
    if scale.exponent:
        intro += f"Values are given in units of {scale.words}."
    charts = [
        section("Distribution of the values", distribution(place, valued, scale)),
        section("Values by domain", by_domain(place, valued, scale)),
        section("Values over training time", over_time(place, source, which)),
        section("Predicted and actual decrease", predicted_and_actual(place, source, which)),
        section("Single steps", single_steps(place, source, which)),
        section("Share by kind of layer", by_kind(place, source, which)),
    ]
    lists = [
        section(f"Examples: {title[0].lower()}{title[1:]}", _examples(ranked, indices, scale))
        for title, indices in best_and_worst(ranked.values, count)
    ]
    return "\n".join(
        [
            f'<section id="{place}">',
            f"<h2>{escape(heading)}</h2>",
            paragraph(intro),
            f'<div class="grid">\n{chr(10).join(charts)}\n</div>',
            f'<div class="grid">\n{chr(10).join(lists)}\n</div>',
            "</section>",
        ]
    )


def _examples(ranked: Valued, indices: Any, scale: Scale) -> str:
    cards = []
    for n in indices:
        visits = ranked.visits[n]
        error = f" ± {scale.plain(ranked.errors[n])}" if ranked.has_error[n] else ""
        cards.append(
            f'<li class="{"helps" if ranked.values[n] >= 0 else "hurts"}">'
            f'<div class="head"><span class="number">{escape(scale.signed(ranked.values[n]))}'
            f"{escape(error)}</span> "
            f"<strong><bdi>{escape(ranked.ids[n])}</bdi></strong> "
            f'<span class="soft"><bdi>{escape(ranked.domains[n])}</bdi>, '
            f"{visits} {'visit' if visits == 1 else 'visits'}, rank {n + 1}</span></div>"
            f'<p class="excerpt" dir="auto">{escape(ranked.excerpts[n])}</p></li>'
        )
    note = f"{scale.within('Value ± its standard error')}."
    return f'{paragraph(note, "soft")}\n<ol class="examples">\n{chr(10).join(cards)}\n</ol>'


def _about(source: Run) -> str:
    options = source.metadata.get("options") or (source.summary or {}).get("options") or {}
    rows = [(str(name), _text(value)) for name, value in options.items()]
    seconds = (source.summary or {}).get("seconds")
    if isinstance(seconds, int | float):
        rows.append(("seconds of training", f"{seconds:.1f}"))
    for group in ("versions", "fingerprints"):
        entries = source.metadata.get(group)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            rows.append((f"{name} ({group.rstrip('s')})", _text(value)))
    body = section("Losses", losses(source))
    listing = table("Options and versions", ("name", "setting"), rows)
    body += section(
        "Options and versions",
        f"<details><summary>How the run was started</summary>\n{listing}\n</details>",
    )
    return f'<section id="about">\n<h2>The run</h2>\n<div class="grid">\n{body}\n</div>\n</section>'


def _text(value: Any) -> str:
    """A setting, on one line and not too long."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= 200 else text[:199] + "…"
