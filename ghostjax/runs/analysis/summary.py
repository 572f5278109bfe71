"""What a run comes to: values by domain, how well they tell domains apart, and their fidelity."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ghostjax import fidelity
from ghostjax.runs.analysis import judgement
from ghostjax.runs.analysis.domains import by_domain
from ghostjax.runs.analysis.statistics import roc_auc
from ghostjax.runs.analysis.values import Valued, measured, read_values
from ghostjax.runs.store import files
from ghostjax.runs.store.run import Run, read_run
from ghostjax.runs.store.schema import SCHEMA_VERSION, table_schema


def make_summary(run: Run, seconds: float) -> tuple[dict[str, Any], Iterator[pa.Table]]:
    """What ``summary.json`` and ``values.parquet`` hold, this some rows at a time.

    The loss is that of the last step, before its update; losses on validation sets are those of the
    last step that was scored, where its gradients were taken.
    """
    valued = read_values(run)
    found = {name: measure_fidelity(run, name, own) for name, own in valued.items()}
    aucs = {name: own_above(name, own) for name, own in valued.items()}
    aucs = {name: auc for name, auc in aucs.items() if auc is not None}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "finished": True,
        "steps": run.end,
        "scored_steps": int(run.scored.sum()),
        "loss": run.steps["loss"][-1].as_py(),
        "val_loss": {name: last_loss(run, name) for name in run.sets},
        "unit": run.unit,
        "domains": {name: values_by_domain(own) for name, own in valued.items()},
        "auc": aucs or None,
        "fidelity": {name: _finite(dataclasses.asdict(own)) for name, own in found.items()},
        "warnings": run_warnings(run, found),
        "seconds": round(seconds, 1),
    }
    return summary, _values_tables(run, valued)


def write_summary(out: Path, seconds: float, **further: Any) -> dict[str, Any]:
    """Writes the summary of a run that is over, with ``further`` entries, and the values."""
    run = read_run(out)
    summary, values = make_summary(run, seconds)
    summary |= further
    files.write_tables(out / "values.parquet", table_schema("values", run.sets), values)
    files.write_json(out / "summary.json", summary)
    return summary


def last_loss(run: Run, name: str) -> float | None:
    """The loss on a validation set at the last scored step."""
    losses = run.steps[f"val_loss_{name}"].drop_null()
    return losses[-1].as_py() if len(losses) else None


def run_warnings(run: Run, fidelities: dict[str, fidelity.Fidelity]) -> list[str]:
    """Why the values should not be trusted: the same lines in ``train``, ``rank`` and ``report``.

    Where there are several validation sets, every line begins with the name of its own.
    """
    return [
        f"{name}: {sentence}" if len(fidelities) > 1 else sentence
        for name, found in fidelities.items()
        for sentence in judgement.warnings(run, name, found)
    ]


def measure_fidelity(run: Run, name: str, valued: Valued) -> fidelity.Fidelity:
    """The fidelity of the values for validation set ``name``, from the log."""
    scored, visited = run.scored, valued.select(valued.visited)
    is_known = len(visited) == 0 or visited.has_error.any()
    return fidelity.summarize(
        predicted=measured(run, f"predicted_{name}"),
        actual=measured(run, f"actual_{name}"),
        correlations=run.numbers("steps", f"correlation_{name}")[scored],
        conservation_errors=measured(run, f"conservation_error_{name}"),
        audit_errors=run.numbers("steps", f"audit_error_{name}")[scored],
        values=visited.values,
        value_errors=visited.errors if is_known else None,
        tolerance=judgement.tolerance_of(run.metadata),
    )


def values_by_domain(valued: Valued) -> dict[str, dict[str, Any]]:
    """Per domain: examples, visits, value (their sum) and mean (per visited example, or None)."""
    return {
        one.name: {"examples": one.examples, "visits": one.visits}
        | _finite({"value": one.total, "mean": one.mean})
        for one in by_domain(valued)
    }


def own_above(name: str, valued: Valued) -> float | None:
    """ROC AUC of the values for telling domain ``name`` from all others, over visited examples.

    None where there is no such domain, or no other.
    """
    visited = valued.select(valued.visited)
    own = visited.domains == name
    if not own.any() or own.all():
        return None
    return roc_auc(visited.values[own], visited.values[~own])


def _values_tables(run: Run, valued: dict[str, Valued]) -> Iterator[pa.Table]:
    schema, count = table_schema("values", run.sets), len(next(iter(valued.values())))
    for start in range(0, count, files.ROW_GROUP):
        rows = slice(start, start + files.ROW_GROUP)
        some = {name: own.select(rows) for name, own in valued.items()}
        first = next(iter(some.values()))
        columns = {"id": first.ids, "domain": first.domains, "visits": first.visits}
        for name, own in some.items():
            columns |= {f"value_{name}": own.values, f"error_{name}": own.errors}
            columns[f"verdict_{name}"] = own.verdicts
        arrays = [
            # from_pandas: NaN is null.
            pa.array(columns[field.name], field.type, from_pandas=field.nullable)
            for field in schema
        ]
        yield pa.table(arrays, schema=schema)


def _finite(figures: dict[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN: what is undefined is null."""
    return {
        name: None if isinstance(figure, float) and not math.isfinite(figure) else figure
        for name, figure in figures.items()
    }
