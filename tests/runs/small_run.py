"""A run directory without training, for tests of what writes and reads it."""

import json

import numpy as np
import pyarrow as pa

from ghostjax.runs.store import files, schema
from ghostjax.runs.store.log import LogWriter

SETS = ("val", "clean")
IDS = ("a:0", "a:1", "b:0", "b:1")
BATCH_SIZE = 3


def rows(table, step):
    """Columns as a training loop has them: arrays over rows, and scalars."""
    rng = np.random.default_rng((step, schema.LOG_TABLES.index(table)))

    def numbers(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if table == "scores":
        ids = np.array(IDS, object)[rng.permutation(len(IDS))[:BATCH_SIZE]]
        columns = {"id": ids, "start": rng.integers(9, size=BATCH_SIZE), "learning_rate": 0.5}
        columns |= {"loss": numbers(BATCH_SIZE), "norm": abs(numbers(BATCH_SIZE))}
        columns |= {f"score_{name}": numbers(BATCH_SIZE) for name in SETS}
        columns |= {f"error_{name}": abs(numbers(BATCH_SIZE)) for name in SETS}
    elif table == "steps":
        names = schema.table_schema(table, SETS).names
        columns = {name: float(numbers()) for name in names if name != "step"}
        columns["undefined"] = 3
        columns |= {f"audit_error_{name}": None if step % 2 else 0.5 for name in SETS}
    else:
        columns = {"kind": ["Dense", "Dense", "Embed", "Embed"], "set": SETS * 2}
        columns["score"] = numbers(4)
    return {"step": step, **columns}


def begin(out):
    """What is written before the first step."""
    out.mkdir()
    examples = pa.table(
        [IDS, [name[0] for name in IDS], [5] * len(IDS), ["text"] * len(IDS)],
        schema=schema.table_schema("examples", SETS),
    )
    files.write_table(out / "examples.parquet", examples)
    metadata = {"schema_version": schema.SCHEMA_VERSION, "sets": list(SETS)}
    files.write_json(out / "run.json", metadata)


def resume(out, steps, every):
    """Goes on from the checkpoint to the end, with a checkpoint every few steps."""
    checkpoint = out / "checkpoint.json"
    first = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    log = LogWriter.resume(out, SETS, first)
    for step in range(first, steps):
        for table in schema.LOG_TABLES:
            log.append(table, rows(table, step))
        if (step + 1) % every == 0 or step + 1 == steps:
            log.flush(step + 1)
            files.write_json(checkpoint, {"step": step + 1})


def write(out, steps=8, every=2):
    """A whole run."""
    begin(out)
    resume(out, steps, every)
    return out
