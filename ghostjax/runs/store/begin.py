"""What a run directory holds before its first step."""

import platform
import sys
import uuid
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

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


def write_examples(out: Path, columns: Iterable[Sequence[Any]]) -> None:
    """Writes the training examples; ``columns`` are ids, domains, sizes and excerpts."""
    fields = schema.table_schema("examples", ())
    arrays = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    files.write_table(out / "examples.parquet", pa.table(arrays, schema=fields))
