"""The options of a training run, and the error for options or data that cannot be used."""

import dataclasses
import math
from pathlib import Path

from ghostjax.runs.models import SIZES, SizeName


class UsageError(ValueError):
    """The caller's options or files cannot be used; the message is one line and says why."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a GPT-2-shaped model on text and scores every training document.

    The score says how much the document helped or hurt a held-out validation set. The first line
    below needs no data: it trains on reference prose and source code cut from the Python
    installation, with prose of other topics held out.

        ghostjax train --out run
        ghostjax train --out run --train forum.jsonl wiki.txt --val held_out.txt

    The score of a document sums, over its visits, the first-order decrease of the mean validation
    loss, in nats per token, by the document's share of the update. Positive helps. The update is
    that of AdamW after clipping, linearised at the gradient of the step before.

    The run directory gets documents.parquet, scores.parquet, steps.parquet and summary.json.

    Attributes:
      out: The run directory to write. It must be new or empty.
      model: The model's size: GPT-2-shaped, over bytes; gpt2 has the shape of GPT-2 small.
      train: Files to train on, .txt (one document per block of lines; blank lines separate blocks)
        or .jsonl (one document per line). A document's domain is the file's stem and its id
        stem:index, counted from 0.
      val: Files with the held-out documents, in the same formats.
      text_field: The field of a .jsonl line that holds the text.
      steps: Training steps.
      batch_size: Training documents per step (B).
      val_batch_size: Held-out documents per step (V), drawn anew at every step.
      length: Positions per row (T). Shorter documents are padded; of a longer one, every visit
        sees a window of T + 1 bytes at a random place. None: all of the model's positions.
      learning_rate: Peak learning rate of AdamW, after a warm-up and before a cosine decay.
        None: the model's own.
      seed: Seed of the initial parameters, the order of the documents and all sampling.
      quiet: Print nothing but errors.
    """

    out: Path
    model: SizeName = "tiny"
    train: tuple[Path, ...] = ()
    val: tuple[Path, ...] = ()
    text_field: str = "text"
    steps: int = 512
    batch_size: int = 16
    val_batch_size: int = 16
    length: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    quiet: bool = False

    @property
    def positions(self) -> int:
        """T, the positions per row."""
        return SIZES[self.model].positions if self.length is None else self.length

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate of the run."""
        default = SIZES[self.model].learning_rate
        return default if self.learning_rate is None else self.learning_rate

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        if self.model not in SIZES:
            raise UsageError(f"unknown model {self.model!r}: expected one of {', '.join(SIZES)}")
        for name in ("steps", "batch_size", "val_batch_size"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least 1, got {getattr(self, name)}")
        limit = SIZES[self.model].positions
        if not 1 <= self.positions <= limit:
            raise UsageError(
                f"--length must be from 1 to {limit}, the positions of model {self.model}, "
                f"got {self.positions}"
            )
        if not (math.isfinite(self.peak_learning_rate) and self.peak_learning_rate > 0):
            raise UsageError(f"--learning-rate must be positive, got {self.learning_rate:g}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if bool(self.train) != bool(self.val):
            given, missing = ("--train", "--val") if self.train else ("--val", "--train")
            raise UsageError(f"{given} needs {missing}: own data takes files for both")
