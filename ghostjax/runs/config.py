"""The options of a training run."""

import dataclasses
import glob
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from ghostjax.runs.errors import UsageError
from ghostjax.runs.models import SIZES, SizeName
from ghostjax.runs.store.schema import SET_NAME

OWN_LEARNING_RATE = 1e-3
# What a task of one's own says itself.
FOR_OTHER_DATA = (
    "model",
    "train",
    "val",
    "text_field",
    "id_field",
    "domain_field",
    "tokenizer",
    "length",
)
# What a resumed run may have anew: neither changes the steps that were made.
CHANGEABLE = ("steps", "mesh", "fsdp")
OF_THE_PROCESS = ("coordinator", "num_processes", "process_id", "distributed")


def check_set_name(name: Any, where: str) -> None:
    """Raises ``UsageError`` for what cannot be the name of a validation set."""
    if not (isinstance(name, str) and SET_NAME.fullmatch(name)):
        raise UsageError(
            f"{where}: a validation set's name has letters, digits and hyphens alone, got {name!r}"
        )


def _files(option: str, pattern: str) -> list[Path]:
    """The file of this name, or the files that the pattern fits, in the order of their names."""
    if pattern == glob.escape(pattern) or os.path.exists(pattern):
        return [Path(pattern)]
    found = sorted(filter(os.path.isfile, glob.iglob(pattern, recursive=True)))
    if not found:
        brackets = "; a [ that is in a name itself is written [[]" if "[" in pattern else ""
        raise UsageError(f"{option} {pattern}: no file fits this pattern{brackets}")
    return list(map(Path, found))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a model and scores every training example.

    The score says how much the example helped or hurt a validation set. The first line below needs
    no data: it trains on reference prose and source code cut from the Python installation, with
    prose and code of other topics held out. The third hunts for wrong labels. The fifth trains a
    model of your own. The last two go on with a run that was interrupted, and with one that is to
    be longer.

        ghostjax train --out run
        ghostjax train --out run --train forum.jsonl wiki.txt --val held_out.txt
        ghostjax train --out run --train "shards/*.parquet" --val held_out.txt
        ghostjax train --out run --train digits.npz --val clean=clean.npz
        ghostjax train --out run --val prose=a.txt code=b.txt --optimizer "sgd(momentum=0.9)"
        ghostjax train --out run --task my_module:make_task --optimizer sgd
        ghostjax train --out run --resume
        ghostjax train --out run --resume --steps 1024

    The score of an example sums, over its visits, the predicted decrease of the mean validation
    loss, in the unit of the loss, by the example's share of the optimizer's update. Positive helps.

    The run directory gets the log, in Parquet, and checkpoints while training goes on; in the end
    values.parquet and summary.json.

    Attributes:
      out: The run directory to write. It must be new or empty, but for --resume.
      resume: Go on with the run in --out from its last checkpoint, with the options it was started
        with. --steps may be given to change its length, that of a complete run too: the learning
        rate goes on as in a run of so many steps. So may --mesh and --fsdp, for other devices.
      task: module:function, which returns a ghostjax.Task: your own data, model and losses, and
        optimizer if you like. The module is looked for in the working directory, too. Options for
        other models and data are refused beside it; --dtype then says what it computes in.
      init_from: Start from these weights: an orbax checkpoint, such as RUN/checkpoints/512, or a
        .safetensors file. Names and shapes must be those of the model's parameters.
      model: The model's size. For texts a GPT-2-shaped decoder; gpt2 has the shape of GPT-2 small.
        For arrays a perceptron.
      train: Files to train on, or patterns of them in quotes, such as "shards/*.jsonl", taken in
        the order of their names. Texts: .txt (one document per block of lines; blank lines separate
        blocks), .jsonl (one document per line) or .parquet (one per row); those of fewer than two
        bytes or tokens are skipped. They are read as steps ask for them and need not fit into
        memory. Arrays to classify: .npz with x [N, ...] and integer labels y [N]. An example's id
        is stem:index, counted from 0; its domain is the file's stem, or label-<y> for arrays.
      val: Files with the held-out examples, in the same formats, of one validation set or, written
        NAME=PATH, of several, for which examples are scored separately.
      text_field: The field of a .jsonl line, or column of a .parquet, that holds the text.
      id_field: The field that holds a text's id, a string or an integer, each there once. None:
        ids are stem:index.
      domain_field: The field that holds a text's domain. None: the file's stem.
      tokenizer: A tokenizer.json of Hugging Face tokenizers. None: tokens are bytes.
      steps: Training steps.
      batch_size: Training examples per step (B).
      microbatches: How many parts of the batch are differentiated one after another, to save
        memory; more than 1 takes a second pass.
      val_batch_size: Held-out examples per step and validation set (V), even, drawn anew at every
        step. Halves of them tell the sampling error of the scores.
      length: Positions per row (T). Shorter documents are padded; of a longer one, every visit
        sees a window of T + 1 tokens at a random place. None: all of the model's positions.
      optimizer: An optimizer of optax by name, or with arguments: "adamw(b2=0.95)", "contrib.muon".
      learning_rate: Peak learning rate, after a warm-up and before a cosine decay. None: the
        model's own; 0.001 with --task.
      clip: The largest norm of the gradient; a larger one is scaled down. 0: do not clip.
      order: Where the validation gradient is taken. 2: at the midpoint of the update, so that
        scores know about curvature. 1: at the parameters; it saves a forward pass over a quarter
        of the validation rows.
      score_every: Score every so many steps; those between are plain training steps, whose rows
        have losses in the log but no scores, and which cost nothing extra. A value sums the scored
        visits.
      norms: Also log the norm of every scored row's gradient, for ghostjax rank --by norm. It takes
        a forward and a backward pass more, about the time of a plain step.
      dtype: What is computed in. Parameters, sums and scores are float32.
      remat: Recompute activations in the backward pass, to save memory; takes a second pass for the
        scores.
      audit_every: Every so many scored steps, two rows are redone by plain autodiff, and scores are
        compared with plain inner products. 0: never.
      checkpoint_every: Every so many steps, the log and a checkpoint are written to disk.
      mesh: Devices along the axes data and model, as "data=4,model=2". Rows are split over data,
        the built-in models' matrices over model. None: all devices that there are, along data.
      fsdp: Split parameters and optimizer state over data, too, each along its largest axis that
        can be divided.
      coordinator: HOST:PORT of the first of several processes that make the run together, one a
        host; all are given the same options but --process-id.
      num_processes: How many processes there are.
      process_id: Which of them this is, from 0.
      distributed: Several processes, as the cluster says: TPU pods, SLURM, Open MPI, Kubernetes.
      seed: Seed of the initial parameters, the order of the examples and all sampling.
      compilation_cache: Keep compiled programs in the user's cache directory
        (XDG_CACHE_HOME or ~/.cache, ghostjax/compiled), so that the next run starts at once.
      quiet: Print nothing but errors.
    """

    out: Path
    resume: bool = False
    task: str | None = None
    init_from: Path | None = None
    model: SizeName = "tiny"
    train: tuple[Path, ...] = ()
    val: tuple[str, ...] = ()
    text_field: str = "text"
    id_field: str | None = None
    domain_field: str | None = None
    tokenizer: Path | None = None
    steps: int = 512
    batch_size: int = 16
    microbatches: int = 1
    val_batch_size: int = 16
    length: int | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    clip: float = 1.0
    order: Literal[1, 2] = 2
    score_every: int = 1
    norms: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    audit_every: int = 64
    checkpoint_every: int = 64
    mesh: str | None = None
    fsdp: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    distributed: bool = False
    seed: int = 0
    compilation_cache: bool = True
    quiet: bool = False

    @property
    def positions(self) -> int:
        """T, the positions per row."""
        return SIZES[self.model].positions if self.length is None else self.length

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate of the run."""
        default = SIZES[self.model].learning_rate if self.task is None else OWN_LEARNING_RATE
        return default if self.learning_rate is None else self.learning_rate

    @property
    def train_files(self) -> list[Path]:
        """The files to train on; raises ``UsageError`` for a pattern that no file fits."""
        return [path for given in self.train for path in _files("--train", str(given))]

    @property
    def val_files(self) -> dict[str, list[Path]]:
        """As ``train_files``, of each validation set. Those without a name are of ``val``."""
        files: dict[str, list[Path]] = {}
        for text in self.val:
            name, separator, path = text.partition("=")
            if not separator:
                name, path = "val", text
            if os.sep in name:
                raise UsageError(
                    f"--val {text}: a path with = in it needs a name before it, as val={text}"
                )
            check_set_name(name, f"--val {text}")
            files.setdefault(name, []).extend(_files("--val", path))
        return files

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices along each axis that ``mesh`` names."""
        if self.mesh is None:
            return {}
        pairs = [text.strip().partition("=") for text in self.mesh.split(",")]
        sizes = {name: int(size) for name, _, size in pairs if size.isdecimal() and int(size)}
        if len(sizes) < len(pairs) or not sizes.keys() <= {"data", "model"}:
            raise UsageError(
                f"--mesh {self.mesh}: expected numbers of devices along data and model, such as "
                "data=4,model=2"
            )
        return sizes

    def check_processes(self) -> None:
        """Raises ``UsageError`` for options of several processes that cannot be used together."""
        own = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        missing = [f"--{name.replace('_', '-')}" for name, value in own.items() if value is None]
        if 0 < len(missing) < len(own):
            raise UsageError(f"several processes need {' and '.join(missing)}, too")
        if self.coordinator is None:
            return
        if self.distributed:
            raise UsageError("--coordinator and --distributed exclude each other")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(
                f"--coordinator {self.coordinator}: expected HOST:PORT, a port from 1 to 65535"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise UsageError(
                f"--process-id {self.process_id} must be from 0 to {self.num_processes - 1}, one "
                f"less than --num-processes {self.num_processes}"
            )

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        if self.model not in SIZES:
            raise UsageError(f"unknown model {self.model!r}: expected one of {', '.join(SIZES)}")
        least = {"steps": 1, "batch_size": 1, "microbatches": 1, "val_batch_size": 2}
        least |= {"score_every": 1, "audit_every": 0, "checkpoint_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least {bound}, got {getattr(self, name)}")
        if self.score_every > self.steps:
            raise UsageError(
                f"--score-every {self.score_every} is more than --steps {self.steps}: no step "
                "would be scored"
            )
        if self.val_batch_size % 2:
            raise UsageError(f"--val-batch-size must be even, got {self.val_batch_size}")
        if self.batch_size % self.microbatches:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be divided into --microbatches "
                f"{self.microbatches}"
            )
        if self.task is not None:
            self._check_own()
        limit = SIZES[self.model].positions
        if not 1 <= self.positions <= limit:
            raise UsageError(
                f"--length must be from 1 to {limit}, the positions of model {self.model}, "
                f"got {self.positions}"
            )
        if not (math.isfinite(self.peak_learning_rate) and self.peak_learning_rate > 0):
            raise UsageError(f"--learning-rate must be positive, got {self.learning_rate:g}")
        if not (math.isfinite(self.clip) and self.clip >= 0):
            raise UsageError(f"--clip must be positive, or 0 not to clip, got {self.clip:g}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if bool(self.train) != bool(self.val):
            given, missing = ("--train", "--val") if self.train else ("--val", "--train")
            raise UsageError(f"{given} needs {missing}: own data takes files for both")
        _ = self.train_files, self.val_files, self.mesh_sizes

    def _check_own(self) -> None:
        defaults = TrainConfig(self.out)
        for name in FOR_OTHER_DATA:
            if getattr(self, name) != getattr(defaults, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} and --task exclude each other: the task says it")

    def as_json(self) -> dict[str, Any]:
        """The options that make the run what it is, as ``run.json`` keeps them."""
        options = dataclasses.asdict(self)
        for name in ("out", "resume", "compilation_cache", "quiet", *OF_THE_PROCESS):
            del options[name]
        # Absolute, so that the run goes on from any directory.
        options["train"] = [os.path.abspath(path) for path in self.train_files]
        options["val"] = [
            f"{name}={os.path.abspath(path)}"
            for name, paths in self.val_files.items()
            for path in paths
        ]
        for name in ("tokenizer", "init_from"):
            path = getattr(self, name)
            options[name] = None if path is None else os.path.abspath(path)
        return options

    def resumed(
        self, options: dict[str, Any], given: Collection[str] | None = None
    ) -> "TrainConfig":
        """The configuration of a run that was started with ``options``, to go on with it.

        Args:
          given: The names of the options that were given; of these, those of ``CHANGEABLE`` are
            taken over. None: those that are not as by default.

        Raises:
          UsageError: an option was given that the run does not have.
        """
        defaults, own = TrainConfig(self.out).as_json(), self.as_json()
        if given is None:
            given = [name for name, value in own.items() if value != defaults[name]]
        known = {name: options.get(name, default) for name, default in defaults.items()}
        for name in own.keys() & set(given):
            if name not in CHANGEABLE and own[name] != known[name]:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--resume goes on with the options of the run in {self.out}: it has "
                    f"--{option} {known[name]}, not {own[name]}"
                )
        known |= {name: own[name] for name in CHANGEABLE if name in given}
        known["train"] = tuple(Path(path) for path in known["train"])
        known["val"] = tuple(known["val"])
        for name in ("tokenizer", "init_from"):
            known[name] = None if known[name] is None else Path(known[name])
        return dataclasses.replace(self, **known)
