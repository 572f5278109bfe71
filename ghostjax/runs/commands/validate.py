"""``ghostjax validate``: the values against real retraining without some of the examples."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ghostjax.runs.analysis.statistics import correlation_interval, spearman
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.commands.options import use_compilation_cache
from ghostjax.runs.commands.sources import initial_params, read_task
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import output
from ghostjax.runs.store import files
from ghostjax.runs.store.fingerprint import fingerprint
from ghostjax.runs.store.run import Run, read_run
from ghostjax.runs.training.retraining import Retraining

FOLDER = "validate"
MIN_SUBSETS = 4  # a rank correlation of fewer says nothing
WHAT_IT_IS = (
    "A value sums up what single steps did with an example in them; the report tells how well that "
    "is predicted. What later steps make of its absence is in no value, least of all where many "
    "are absent at once: for long runs, the correlation can be far below 1 though every score is "
    "exact."
)


@dataclasses.dataclass(frozen=True)
class ValidateConfig:
    """Compares the values with real retraining without some of the examples.

    Draws subsets of the training examples at random, trains once more without each of them, and
    compares what that changes about the validation losses with the sums of the subsets' values: the
    linear datamodelling score, Spearman's rank correlation over the subsets. It is 1 if values tell
    the order of all subsets, and 0 if they tell nothing of it.

        ghostjax validate run
        ghostjax validate run --subsets 32 --fraction 0.25
        ghostjax validate run --json | jq '.sets.prose.spearman'

    Every retraining has the run's own initial parameters, batches, windows and learning rates.
    Without an example, its share is taken out of its steps' gradients, whose other rows keep their
    weight of one over the batch size. Losses are those at the end, of all validation examples, a
    window each, and are compared with a retraining that leaves out nothing.

    It takes as long as --subsets + 1 runs without scores, tells how long before it begins, and
    keeps every retraining that is done in the folder validate of the run: called again, it goes on.

    --json prints, per validation set, spearman, its interval, subsets, and for each subset the
    predicted and the actual change of the loss.

    Attributes:
      run: The run directory of a run that is over. It needs the files that the run was started
        with.
      subsets: How many retrainings, 4 or more.
      fraction: How many of the training examples each leaves out.
      seed: Of the subsets.
      json: Print JSON.
      compilation_cache: Keep compiled programs, as ghostjax train does.
      quiet: Print the result alone.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    subsets: int = 16
    fraction: float = 0.5
    seed: int = 0
    json: bool = False
    compilation_cache: bool = True
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        if self.subsets < MIN_SUBSETS:
            raise UsageError(f"--subsets must be at least {MIN_SUBSETS}, got {self.subsets}")
        if not 0 < self.fraction < 1:
            raise UsageError(f"--fraction must be between 0 and 1, got {self.fraction}")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, got {self.seed}")


def run(config: ValidateConfig) -> None:
    """Retrains and prints the comparison.

    Raises:
      UsageError: an option, the run directory or its data cannot be used.
      OSError: a result cannot be written; those before it are kept.
    """
    config.check()
    source = read_run(config.run)
    if not source.is_finished:
        raise UsageError(f"{config.run} is not over: go on with it by ghostjax train --resume")
    use_compilation_cache(config.compilation_cache)
    train_config, task = read_task(source)
    # Its use is that the data and the start are those of the run.
    params = initial_params(train_config, task)
    if fingerprint(params) != source.begun()["fingerprints"]["params"]:
        raise UsageError(f"{config.run}: the initial parameters are not those the run began with")
    del params
    left_out = np.stack([np.zeros(len(task.examples), bool), *_subsets(config, task.examples)])
    with files.lock(config.run):
        again = Retraining(train_config, task, lambda: initial_params(train_config, task))
        losses = _losses(config, source, again, left_out)
    actual = losses[1:] - losses[0]
    result = {}
    for k, (name, valued) in enumerate(read_values(source).items()):
        measured = np.nan_to_num(valued.values)
        predicted = np.array([mask @ measured for mask in left_out[1:]])
        low, high = correlation_interval(predicted, actual[:, k])
        result[name] = {
            "spearman": spearman(predicted, actual[:, k]),
            "interval": [low, high],
            "subsets": config.subsets,
            "fraction": config.fraction,
            "loss": losses[0, k],
            "predicted": list(predicted),
            "actual": list(actual[:, k]),
        }
    if config.json:
        output.print_json({"run": str(config.run), "sets": result})
        return
    console = output.make_console(sys.stdout)
    for name, found in result.items():
        low, high = found["interval"]
        line = (
            f"Validation set {name}: over {config.subsets} subsets of {config.fraction:.0%} of the "
            f"examples, rank correlation {found['spearman']:.3f} (Spearman; 95% interval "
            f"{low:.3f} to {high:.3f}) between the sum of the values and what the loss rose by "
            f"without them: predicted {np.mean(found['predicted']):+.2e}, actual "
            f"{np.mean(found['actual']):+.2e} in the mean. {_meaning(config.subsets, low, high)}"
        )
        output.print_text(console, line)
    if not config.quiet:
        output.print_text(console, WHAT_IT_IS)


def _meaning(subsets: int, low: float, high: float) -> str:
    """
    >>> _meaning(16, -0.1, 0.6)
    'The interval holds 0, so 16 subsets do not show that values rank them; --subsets adds more.'
    """
    if low > 0 or high < 0:
        return f"The values rank subsets {'better' if low > 0 else 'worse'} than chance does."
    return (
        f"The interval holds 0, so {subsets} subsets do not show that values rank them; --subsets "
        "adds more."
    )


def _subsets(config: ValidateConfig, examples: Any) -> Iterator[np.ndarray]:
    """Masks of what each retraining leaves out, [n] bool; those of a seed begin alike."""
    count = round(config.fraction * len(examples))
    if not 0 < count < len(examples):
        raise UsageError(
            f"--fraction {config.fraction} of {len(examples)} examples leaves out {count}: it must "
            "be some of them and not all"
        )
    for number in range(config.subsets):
        rng = np.random.default_rng([config.seed, number])
        mask = np.zeros(len(examples), bool)
        mask[rng.choice(len(examples), count, replace=False)] = True
        yield mask


def _losses(
    config: ValidateConfig, source: Run, retraining: Retraining, left_out: np.ndarray
) -> np.ndarray:
    """[1 + subsets, K]: the validation losses at the end of each retraining, those done read."""
    folder = config.run / FOLDER
    folder.mkdir(exist_ok=True)
    console = None if config.quiet else output.make_console(sys.stderr)
    losses: list[Any] = [_done(folder, source, mask) for mask in left_out]
    todo = [n for n, found in enumerate(losses) if found is None]
    if todo and console:
        seconds = retraining.seconds() * len(todo)
        done = f", {len(losses) - len(todo)} are done" * (len(todo) < len(losses))
        line = f"{len(todo)} retrainings of {source.end} steps, about {_time(seconds)}{done}"
        output.print_text(console, line)
    for place, n in enumerate(todo, start=1):
        begin = time.perf_counter()
        losses[n] = retraining.losses_without(left_out[n])
        value = {"steps": source.end, "losses": losses[n].tolist()} | source.identity
        files.write_json(folder / _name(source, left_out[n]), value)
        if console:
            taken = _time(time.perf_counter() - begin)
            output.print_text(console, f"retraining {place}/{len(todo)} took {taken}")
    return np.stack(losses)


def _name(source: Run, mask: np.ndarray) -> str:
    """By what it leaves out, and how long the run is."""
    return f"{source.end}-{fingerprint({'left_out': mask})[:16]}.json"


def _done(folder: Path, source: Run, mask: np.ndarray) -> np.ndarray | None:
    path = folder / _name(source, mask)
    found = files.read_json(path)
    if found is None:
        return None
    if {name: found.get(name) for name in source.identity} != source.identity:
        raise UsageError(f"{path} is of another run: delete it")
    return np.array(found["losses"])


def _time(seconds: float) -> str:
    """
    >>> _time(3.2), _time(200)
    ('3.2 s', '3.3 min')
    """
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
