"""What a run comes to: values by domain, how well they tell domains apart, and their fidelity."""

import dataclasses
import functools
import math
from typing import Any

import pyarrow as pa

from ghostjax import fidelity
from ghostjax.runs.analysis.domains import by_domain
from ghostjax.runs.analysis.statistics import roc_auc
from ghostjax.runs.analysis.values import Valued, read_values
from ghostjax.runs.store.run import Run
from ghostjax.runs.store.schema import SCHEMA_VERSION, table_schema


def make_summary(run: Run, seconds: float) -> tuple[dict[str, Any], pa.Table]:
    """What ``summary.json`` and ``values.parquet`` hold.

    Losses are those of the last step, before its update.
    """
    valued = read_values(run)
    measured = {name: measure_fidelity(run, name, own) for name, own in valued.items()}
    several = len(measured) > 1
    warnings = [
        f"{name}: {sentence}" if several else sentence
        for name, found in measured.items()
        for sentence in found.warnings()
    ]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "finished": True,
        "steps": run.end,
        "loss": run.steps["loss"][-1].as_py(),
        "val_loss": {name: run.steps[f"val_loss_{name}"][-1].as_py() for name in run.sets},
        "unit": run.unit,
        "domains": {name: values_by_domain(own) for name, own in valued.items()},
        "auc": {name: auc for name, own in valued.items() if (auc := own_above(name, own))} or None,
        "fidelity": {name: _finite(dataclasses.asdict(found)) for name, found in measured.items()},
        "warnings": warnings,
        "seconds": round(seconds, 1),
    }
    return summary, _values_table(run, valued)


def measure_fidelity(run: Run, name: str, valued: Valued) -> fidelity.Fidelity:
    """The fidelity of the values for validation set ``name``, from the log."""
    column = functools.partial(run.numbers, "steps")
    visited = valued.select(valued.visits > 0)
    return fidelity.summarize(
        predicted=column(f"predicted_{name}"),
        actual=column(f"actual_{name}"),
        correlations=column(f"correlation_{name}"),
        conservation_errors=column("conservation_error"),
        audit_errors=column("audit_error"),
        values=visited.values,
        value_errors=visited.errors,
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
    visited = valued.select(valued.visits > 0)
    own = visited.domains == name
    if not own.any() or own.all():
        return None
    return roc_auc(visited.values[own], visited.values[~own])


def _values_table(run: Run, valued: dict[str, Valued]) -> pa.Table:
    first = next(iter(valued.values()))
    columns = {"id": first.ids, "domain": first.domains, "visits": first.visits}
    for name, own in valued.items():
        columns |= {f"value_{name}": own.values, f"error_{name}": own.errors}
    schema = table_schema("values", run.sets)
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _finite(figures: dict[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN: what is undefined is null."""
    return {
        name: figure if figure is not None and math.isfinite(figure) else None
        for name, figure in figures.items()
    }
