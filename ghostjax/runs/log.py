"""The run directory: Parquet tables and a JSON summary, whole or not at all.

    documents.parquet   one line per training document: id, domain, tokens, visits, score, excerpt
    scores.parquet      one line per visit: step, id, start, learning_rate, score
    steps.parquet       one line per step: step, loss, val_loss
    summary.json        final losses, score by domain, AUC, options

The schemas carry a version, and every column says what it holds and in what unit.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.config import UsageError
from ghostjax.runs.documents import Document
from ghostjax.runs.training import Visits

SCHEMA_VERSION = 1

_VISIT_SCORE = (
    "First-order decrease of the step's mean validation loss, in nats per token, caused by this "
    "row's share of the optimizer's update, which is linearised at the gradient of the step "
    "before; positive helps."
)
_DOCUMENT_SCORE = f"Sum over the document's visits of: {_VISIT_SCORE}"

_FIELDS = {
    "documents": [
        ("id", pa.string(), "Unique id of the training document."),
        ("domain", pa.string(), "Where it comes from."),
        ("tokens", pa.int64(), "Its length in tokens (bytes)."),
        ("visits", pa.int64(), "How many steps trained on it."),
        ("score", pa.float64(), _DOCUMENT_SCORE),
        ("excerpt", pa.string(), "Its beginning, with blanks collapsed."),
    ],
    "steps": [
        ("step", pa.int64(), "Step, from 0."),
        ("loss", pa.float32(), "Mean loss of the step's training rows, nats per token."),
        ("val_loss", pa.float32(), "Mean loss of the step's validation rows, nats per token."),
    ],
    "scores": [
        ("step", pa.int64(), "Step, from 0."),
        ("id", pa.string(), "Id of the training document, as in documents.parquet."),
        ("start", pa.int64(), "First token of the window that this visit saw."),
        ("learning_rate", pa.float32(), "Learning rate of the step."),
        ("score", pa.float32(), _VISIT_SCORE),
    ],
}


def check_out(out: Path) -> None:
    """Raises ``UsageError`` unless ``out`` is new or an empty directory."""
    try:
        if out.is_dir():
            if any(out.iterdir()):
                raise UsageError(f"{out} is not empty: give a new directory")
        elif out.exists() or out.is_symlink():
            raise UsageError(f"{out} is not a directory: give a new one")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror or error}") from error


def create_out(out: Path) -> None:
    """Makes the run directory, so that a place that cannot be written shows before training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create {out}: {error.strerror or error}") from error
    if not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to {out}")


def visit_counts(visits: Sequence[Visits], documents: int) -> np.ndarray:
    """How often each document was visited, [documents]."""
    indices = np.concatenate([visit.indices for visit in visits])
    return np.bincount(indices, minlength=documents)


def document_scores(visits: Sequence[Visits], documents: int) -> np.ndarray:
    """Each document's score, the sum over its visits, float64 [documents], nats per token."""
    indices = np.concatenate([visit.indices for visit in visits])
    scores = np.concatenate([visit.scores for visit in visits])
    return np.bincount(indices, weights=scores.astype(np.float64), minlength=documents)


def make_tables(documents: Sequence[Document], visits: Sequence[Visits]) -> dict[str, pa.Table]:
    """The three tables, by name, from what the steps did."""
    batch_size = len(visits[0].indices)
    steps = np.array([visit.step for visit in visits])
    ids = np.array([document.id for document in documents], object)
    columns = {
        "documents": {
            "id": ids,
            "domain": [document.domain for document in documents],
            "tokens": [len(document.tokens) for document in documents],
            "visits": visit_counts(visits, len(documents)),
            "score": document_scores(visits, len(documents)),
            "excerpt": [document.excerpt() for document in documents],
        },
        "steps": {
            "step": steps,
            "loss": [visit.loss for visit in visits],
            "val_loss": [visit.val_loss for visit in visits],
        },
        "scores": {
            "step": np.repeat(steps, batch_size),
            "id": ids[np.concatenate([visit.indices for visit in visits])],
            "start": np.concatenate([visit.starts for visit in visits]),
            "learning_rate": np.repeat([visit.learning_rate for visit in visits], batch_size),
            "score": np.concatenate([visit.scores for visit in visits]),
        },
    }
    return {name: _table(name, values) for name, values in columns.items()}


def _table(name: str, columns: dict[str, Any]) -> pa.Table:
    fields = [
        pa.field(field, kind, nullable=False, metadata={"description": text})
        for field, kind, text in _FIELDS[name]
    ]
    schema = pa.schema(
        fields,
        metadata={
            "schema_version": str(SCHEMA_VERSION),
            "table": f"ghostjax.{name}",
            "ghostjax_version": metadata.version("ghostjax"),
        },
    )
    return pa.table([pa.array(columns[field.name], field.type) for field in fields], schema=schema)


def write_run(out: Path, tables: dict[str, pa.Table], summary: dict[str, Any]) -> None:
    """Writes ``out/<name>.parquet`` for each table, then ``out/summary.json``.

    Every file is written aside, forced to disk and renamed into place; the summary comes last, so a
    directory with a summary is complete.

    Raises:
      UsageError: ``out`` is not empty.
      OSError: something cannot be written; nothing half-written is left.
    """
    check_out(out)
    writers: dict[str, Callable[[IO[bytes]], Any]] = {
        f"{name}.parquet": lambda file, table=table: pq.write_table(table, file)
        for name, table in tables.items()
    }
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    writers["summary.json"] = lambda file: file.write(text.encode())

    aside = {name: out / f".{name}.partial" for name in writers}
    try:
        for name, write in writers.items():
            with aside[name].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for name, path in aside.items():
            os.replace(path, out / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    _sync_directory(out)


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a directory be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
