"""What a run directory holds before its first step."""

import platform
import sys
import uuid
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from ghostjax.runs.listed import Listed, in_tables
from ghostjax.runs.store import files, schema


def begun_now(task: str, unit: str, sets: Sequence[str]) -> dict[str, Any]:
    """What every ``run.json`` holds."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "id": uuid.uuid4().hex,
        "task": task,
        "unit": unit,
        "sets": list(sets),
        "command": sys.argv,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    packages = ("ghostjax", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def write_examples(out: Path, examples: Iterable[Sequence[Any]]) -> None:
    """Writes the training examples, each its id, domain, size and excerpt, as they come."""
    fields = schema.table_schema("examples", ())
    tables = examples.tables() if isinstance(examples, Listed) else in_tables(examples)
    whole = (pa.table(table.columns, schema=fields) for table in tables)
    files.write_tables(out / "examples.parquet", fields, whole)
