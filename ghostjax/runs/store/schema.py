"""The run directory: which files it has, and what every column holds, in which unit.

    run.json                        how the run was started: options, versions, fingerprints
    examples.parquet                one line per training example
    log/scores-<first>-<end>.parquet    one line per visit: a training row of a step
    log/steps-<first>-<end>.parquet     one line per step
    log/kinds-<first>-<end>.parquet     one line per step, kind of layer and validation set
    checkpoints/<step>/             what training goes on from (orbax)
    values.parquet                  one line per training example: its value, when the run is over
    summary.json                    the last losses, values by domain, fidelity in figures and words

A part of the log holds the steps first <= step < end, in order, eight digits each, and is there as
a whole or not at all. Where n processes made the run, each wrote its own rows of ``scores``, in
``scores-<first>-<end>-<number>-of-<n>.parquet``, numbered from 1, five digits each. The parts of a
table follow each other without gaps. Columns whose name ends in ``_<set>`` are there once per
validation set; they are null at steps that were not scored, and only there (but for audit_error and
correlation, which only audited steps have). What a loop of one's own does not know (``RunLog``) is
null in the whole log. Every file holds its own digest; see ``seal``.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 3
DIGESTS_SINCE = 2

LOG_TABLES = ("scores", "steps", "kinds")

SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")  # no underscore: it ends a column's own name

_DECREASE = (
    "Predicted decrease of the mean loss of the validation set, in the unit of the loss, caused "
    "by this row's share of the optimizer's update; positive helps."
)
_VALUE = (
    "Sum over the example's scored visits of weight times score. The weight of a step is min(1, "
    "(|actual| + 2 median |actual|) / |predicted|), the median over the steps: 1 but where much "
    "more was predicted than happened. Null without a visit. "
)

# (name, type, description); "{}" in a name stands for the validation set.
_FIELDS = {
    "examples": [
        ("id", pa.string(), "Unique id of the training example."),
        ("domain", pa.string(), "Where it comes from: the file, or the label of a class."),
        ("size", pa.int64(), "Its length: tokens of a text, numbers of an array."),
        ("excerpt", pa.string(), "Its beginning, with blanks collapsed."),
    ],
    "scores": [
        ("step", pa.int64(), "Step, from 0."),
        ("id", pa.string(), "Id of the training example, as in examples.parquet."),
        ("start", pa.int64(), "First token of the window that this visit saw; 0 for arrays."),
        ("loss", pa.float32(), "The row's own loss before the update."),
        (
            "norm",
            pa.float32(),
            "Norm of the gradient of the row's own loss (not divided by the size of the batch), "
            "over all parameters, before the update and before any clipping; in the unit of the "
            "loss per unit of the parameters. Null where it was not measured.",
        ),
        ("learning_rate", pa.float32(), "Learning rate of the step."),
        (
            "score_{}",
            pa.float32(),
            _DECREASE + " As measured, without weight; null where the step was not scored.",
        ),
        (
            "error_{}",
            pa.float32(),
            "Standard error of the score, from the halves of the step's validation rows.",
        ),
    ],
    "steps": [
        ("step", pa.int64(), "Step, from 0."),
        ("loss", pa.float32(), "Mean loss of the step's training rows before the update."),
        ("learning_rate", pa.float32(), "Learning rate of the step."),
        (
            "undefined",
            pa.int64(),
            "Coordinates of the update that have no finite derivative and count as constants.",
        ),
        (
            "val_loss_{}",
            pa.float32(),
            "Mean loss of the step's validation rows where their gradient is taken: of order 2 "
            "half-way along the update, of order 1 before it.",
        ),
        (
            "predicted_{}",
            pa.float32(),
            "Predicted decrease of the mean loss of some validation rows by the whole update: "
            "minus the inner product of their gradient (of order 2: half-way along the update; of "
            "order 1: before it) with the update. The rows are one of four groups of the step's "
            "validation rows, or of two where four would not be equal: that with the largest "
            "prediction.",
        ),
        (
            "actual_{}",
            pa.float32(),
            "What the mean loss of the same rows decreased by from before the update to after it.",
        ),
        (
            "conservation_error_{}",
            pa.float32(),
            "The certificate: largest relative difference, over the parameters and the halves of "
            "the validation rows, of the summed dots from the inner product of the training "
            "gradient with the direction.",
        ),
        (
            "audit_error_{}",
            pa.float32(),
            "Largest relative error, over the halves of the validation rows, of the scores of some "
            "rows against autodiff of these rows alone; null where the step was not audited.",
        ),
        (
            "correlation_{}",
            pa.float32(),
            "Pearson correlation, over the rows of the step, of the scores with plain inner "
            "products of the rows' gradients and the same validation gradient; null where the step "
            "was not audited.",
        ),
    ],
    "kinds": [
        ("step", pa.int64(), "Step, from 0."),
        ("kind", pa.string(), "Kind of layer."),
        ("set", pa.string(), "Validation set."),
        (
            "score",
            pa.float32(),
            "What its parameters have in the summed size of the step's scores: over the rows, the "
            "sum of their part of the score times the score's sign.",
        ),
    ],
    "values": [
        ("id", pa.string(), "Unique id of the training example."),
        ("domain", pa.string(), "As in examples.parquet."),
        ("visits", pa.int64(), "How many scored rows of the run were of this example."),
        ("value_{}", pa.float64(), _VALUE + _DECREASE),
        (
            "error_{}",
            pa.float64(),
            "Standard error of the value: root of the summed squares of those of its visits, "
            "weighted alike. Null without a visit, or where the scores have no errors.",
        ),
        (
            "verdict_{}",
            pa.string(),
            "What can be said of the example: helps or hurts, by a t test at 5% with 8 visits or "
            "more; unclear; few visits; no error bar; not visited.",
        ),
    ],
}
# Null where a step was not scored, or where a loop of one's own does not know it.
_NULLABLE = {
    "examples": ("size",),
    "scores": ("start", "loss", "norm", "learning_rate", "score_{}", "error_{}"),
    "steps": (
        *("loss", "learning_rate", "undefined"),
        *("val_loss_{}", "predicted_{}", "actual_{}", "correlation_{}"),
        *("conservation_error_{}", "audit_error_{}"),
    ),
    "values": ("value_{}", "error_{}"),
}
# The schema version that a column came with, by table and name, where it is not the first. A table
# that was written before is read with nulls in it, so it is nullable.
_SINCE: dict[tuple[str, str], int] = {("scores", "norm"): 3}


def table_schema(table: str, sets: Sequence[str], version: int | None = None) -> pa.Schema:
    """The schema of a table for validation sets of these names.

    ``version``: as it was in that schema version. None: in the newest.
    """
    version = SCHEMA_VERSION if version is None else version
    fields = [
        pa.field(
            name.format(which),
            kind,
            nullable=name in _NULLABLE.get(table, ()) or (table, name) in _SINCE,
            metadata={"description": description},
        )
        for name, kind, description in _FIELDS[table]
        if _SINCE.get((table, name), 1) <= version
        for which in (sets if "{}" in name else ("",))
    ]
    versions = {"schema_version": str(version), "table": f"ghostjax.{table}"}
    return pa.schema(fields, {**versions, "ghostjax_version": metadata.version("ghostjax")})


def newer(version: int) -> str:
    """What to say of a schema version that this ghostjax does not know."""
    return (
        f"schema version {version}, this ghostjax knows versions up to {SCHEMA_VERSION}: update "
        "ghostjax"
    )


def by_set(table: str, columns: Mapping[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """The columns, of which those that a table has once per validation set are taken apart.

    >>> by_set("scores", {"step": 0, "score": [1.0, 2.0]}, ["a", "b"])
    {'step': 0, 'score_a': 1.0, 'score_b': 2.0}
    """
    several = {name.removesuffix("_{}") for name, *_ in _FIELDS[table] if name.endswith("_{}")}
    found: dict[str, Any] = {}
    for name, value in columns.items():
        if name in several:
            found |= {f"{name}_{which}": own for which, own in zip(sets, value, strict=True)}
        else:
            found[name] = value
    return found


def part_name(table: str, first: int, end: int, process: int = 0, processes: int = 1) -> str:
    """
    >>> part_name("steps", 0, 64)
    'steps-00000000-00000064.parquet'
    >>> part_name("scores", 0, 64, process=0, processes=2)
    'scores-00000000-00000064-00001-of-00002.parquet'
    """
    own = f"-{process + 1:05d}-of-{processes:05d}" if processes > 1 else ""
    return f"{table}-{first:08d}-{end:08d}{own}.parquet"
