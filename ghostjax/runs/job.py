"""The main job: documents in, a trained model and the documents' scores out."""

import dataclasses
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np

from ghostjax.runs import log, report
from ghostjax.runs.builtin import default_documents
from ghostjax.runs.config import TrainConfig, UsageError
from ghostjax.runs.documents import Document, read_documents
from ghostjax.runs.training import Visits, train


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains, writes the run directory ``config.out``, prints a report; returns the summary.

    Everything that can be wrong with the options and the data is found before anything is written.

    Raises:
      UsageError: options or data cannot be used, or ``config.out`` is not empty.
      DivergedError: a loss or a score is not finite; no results are written.
    """
    config.check()
    log.check_out(config.out)
    documents, val_documents = load_documents(config)
    log.create_out(config.out)

    begin = time.perf_counter()
    steps = train(config, documents, val_documents)
    if config.quiet:
        visits = list(steps)
    else:
        progress = report.make_console(sys.stderr)
        visits = report.follow(steps, config.steps, config.batch_size, progress)
    seconds = time.perf_counter() - begin

    scores = log.document_scores(visits, len(documents))
    counts = log.visit_counts(visits, len(documents))
    summary = make_summary(config, documents, len(val_documents), visits, scores, counts, seconds)
    log.write_run(config.out, log.make_tables(documents, visits), summary)
    if not config.quiet:
        console = report.make_console(sys.stdout)
        report.print_report(console, documents, scores, counts, summary)
    return summary


def load_documents(config: TrainConfig) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: the configured files, or those of the Python installation.

    Raises:
      UsageError: they cannot be read, or a batch is larger than the data.
    """
    if config.train:
        documents = read_documents(config.train, config.text_field)
        val_documents = read_documents(config.val, config.text_field)
    else:
        documents, val_documents = default_documents(config.positions + 1)
    for option, size, found in (
        ("--batch-size", config.batch_size, len(documents)),
        ("--val-batch-size", config.val_batch_size, len(val_documents)),
    ):
        if size > found:
            kind = "validation" if "val" in option else "training"
            raise UsageError(f"{option} {size} is more than the {found} {kind} documents there are")
    return documents, val_documents


def make_summary(
    config: TrainConfig,
    documents: list[Document],
    val_documents: int,
    visits: list[Visits],
    scores: np.ndarray,
    counts: np.ndarray,
    seconds: float,
) -> dict[str, Any]:
    """What ``summary.json`` holds; losses are those of the last step, before its update."""
    domains = [document.domain for document in documents]
    return {
        "schema_version": log.SCHEMA_VERSION,
        "ghostjax_version": metadata.version("ghostjax"),
        "loss": visits[-1].loss,
        "val_loss": visits[-1].val_loss,
        "auc": report.prose_above_code(domains, scores, counts),
        "domains": report.scores_by_domain(domains, scores, counts),
        "documents": len(documents),
        "val_documents": val_documents,
        "seconds": round(seconds, 1),
        "options": _options(config),
    }


def _options(config: TrainConfig) -> dict[str, Any]:
    options = dataclasses.asdict(config)
    options.update(
        out=str(config.out),
        train=[str(path) for path in config.train],
        val=[str(path) for path in config.val],
        length=config.positions,
        learning_rate=config.peak_learning_rate,
    )
    del options["quiet"]
    return options
