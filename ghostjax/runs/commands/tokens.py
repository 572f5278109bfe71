"""``ghostjax tokens``: which tokens of a training example helped, and which hurt."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from ghostjax.runs.analysis.values import (
    best_and_worst,
    read_values,
)
from ghostjax.runs.commands.options import (
    check_choice,
    check_count,
    check_formats,
    use_compilation_cache,
)
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import heat, output
from ghostjax.runs.store import checkpoints
from ghostjax.runs.store.files import write_file
from ghostjax.runs.store.run import Run, find, read_run
from ghostjax.runs.training.positions import Windows, score_windows
from ghostjax.runs.training.trainer import Trainer

NAME = "tokens.html"
DEFAULT_COUNT = 3


@dataclasses.dataclass(frozen=True)
class TokensConfig:
    """Shows which tokens of training documents helped, and which hurt.

    Writes a page of coloured texts, tokens.html in the run directory, and prints its path; with
    --print, shows the texts in the terminal instead. Blue helps, orange hurts.

        ghostjax tokens run
        ghostjax tokens run --id wiki:4 forum:0
        ghostjax tokens run --set prose --count 5 --print
        ghostjax tokens run --id wiki:4 --csv > tokens.csv

    The texts are scored once more, as rows of the step that follows a checkpoint: the predicted
    decrease of the validation loss by a row's share of that update. A row of the run that was in
    this step has the score that the log has for it. The score of a token is what the uses of the
    parameters at its position have in it; the scores of a window's tokens add up to its own, which
    is computed apart from them and compared. Of a document that is longer than a row, it takes the
    windows that training saw.

    --csv and --json print one row per validation set, window and token: set, id, start (the
    window's first token), position (in the window), token (in the document), text, score, error.

    Attributes:
      run: The run directory of a run on texts. It needs the files that the run was started with.
      id: The training documents. None: those of the ranking's two ends, by their values.
      count: How many documents of either end, without --id. None: 3.
      set: The validation set. None: each of them.
      step: The checkpoint, by its step. None: the last one.
      windows: At most so many windows of a document: those that were seen nearest to the
        checkpoint.
      val_batch_size: Held-out examples per validation set, even; more of them make the errors
        smaller. None: as many as the run took per step.
      print: Show the texts in the terminal and write nothing.
      csv: Print CSV and write nothing.
      json: Print JSON and write nothing.
      compilation_cache: Keep compiled programs, as ghostjax train does.
      quiet: Do not print the path.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    id: tuple[str, ...] = ()
    count: int | None = None
    set: str | None = None
    step: int | None = None
    windows: int = 2
    val_batch_size: int | None = None
    print: bool = False
    csv: bool = False
    json: bool = False
    compilation_cache: bool = True
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        check_count(self.count)
        if self.id and self.count is not None:
            raise UsageError("--id and --count exclude each other: give one of them")
        if self.windows < 1:
            raise UsageError(f"--windows must be at least 1, got {self.windows}")
        check_formats(self.csv, self.json)
        if self.print and (self.csv or self.json):
            raise UsageError(
                f"--print and --{'csv' if self.csv else 'json'} exclude each other: give one of "
                "them"
            )


def run(config: TokensConfig) -> None:
    """Shows the tokens.

    Raises:
      UsageError: an option, the run directory, its data or its checkpoint cannot be used.
      StoppedError: the tokens' scores do not add up to the rows'.
      OSError: the page cannot be written; an earlier one is unchanged.
    """
    config.check()
    use_compilation_cache(config.compilation_cache)
    source = read_run(config.run)
    if source.metadata.get("task") != TextTask.name:
        raise UsageError(
            f"{config.run} is no run on texts: its examples have no tokens; ghostjax rank lists "
            "them"
        )
    check_choice("validation set", config.set, list(source.sets))
    sets = [config.set] if config.set else list(source.sets)
    step = _step(config)
    groups = _groups(source, config, sets)
    train_config, task = _task(source, config)
    found = _score(source, config, train_config, task, step, groups)

    if config.csv:
        output.print_csv(_rows(source, task, found, groups))
    elif config.json:
        output.print_json(_rows(source, task, found, groups))
    else:
        texts = _texts(source, task, found, groups)
        about = heat.About.of(source, train_config, step)
        if config.print:
            heat.print_texts(output.make_console(sys.stdout), texts, about)
            return
        page = heat.make_page(texts, about)
        path = config.run / NAME
        write_file(path, lambda file: file.write(page.encode()))
        if not config.quiet:
            print(output.plain(str(path)))


def _step(config: TokensConfig) -> int:
    steps = checkpoints.available(config.run)
    if not steps:
        raise UsageError(
            f"{config.run} has no checkpoint: wait for its first one, or go on with it by "
            f"ghostjax train --out {config.run} --resume"
        )
    if config.step is not None and config.step not in steps:
        known = ", ".join(map(str, steps))
        raise UsageError(f"--step: no checkpoint of step {config.step}, expected one of {known}")
    return steps[-1] if config.step is None else config.step


def _groups(
    source: Run, config: TokensConfig, sets: Sequence[str]
) -> dict[str, list[tuple[str, list[int]]]]:
    """By validation set, titles and which examples are shown under them."""
    places = dict(zip(config.id, find(config.id, source.ids).tolist()))
    for name, place in places.items():
        if place < 0:
            raise UsageError(
                f"--id: no training document {name!r} in {source.path}; ghostjax rank "
                f"{source.path} --csv lists their ids"
            )
    if config.id:
        chosen = list(dict.fromkeys(places[name] for name in config.id))
        visited = {place for some in source.visits() for place in set(some["place"].tolist())}
        lists = {
            "Chosen documents": [index for index in chosen if index in visited],
            "Chosen documents that were not visited, so without a value": [
                index for index in chosen if index not in visited
            ],
        }
        return {which: [(title, own) for title, own in lists.items() if own] for which in sets}
    values = read_values(source)
    groups = {}
    for which in sets:
        ranked = values[which].ranked()
        lists = best_and_worst(ranked.values, config.count or DEFAULT_COUNT)
        groups[which] = [
            (f"{title}, by value", ranked.ids.places[indices].tolist()) for title, indices in lists
        ]
    return groups


def _task(source: Run, config: TokensConfig) -> tuple[TrainConfig, TextTask]:
    """The data of the run, read again."""
    train_config, task = read_task(source)
    if config.val_batch_size is not None:
        train_config = dataclasses.replace(train_config, val_batch_size=config.val_batch_size)
        train_config.check()
        least = min(task.val_sizes.values())
        if config.val_batch_size > least:
            raise UsageError(
                f"--val-batch-size {config.val_batch_size} is more than the {least} examples of "
                "the smallest validation set"
            )
    return train_config, task


def _score(
    source: Run,
    config: TokensConfig,
    train_config: TrainConfig,
    task: TextTask,
    step: int,
    groups: dict[str, list[tuple[str, list[int]]]],
) -> Windows:
    trainer = Trainer(train_config, task)
    shapes = jax.eval_shape(lambda: trainer.init_state(task.init_params(train_config.seed)))
    state = checkpoints.restore(source.path, step, shapes, source.identity)
    chosen = {index for lists in groups.values() for _, indices in lists for index in indices}
    seen = _starts(source, step, chosen)
    windows = [
        (index, start)
        for index in sorted(chosen)
        for start in sorted(seen.get(index, [0])[: config.windows])
    ]
    return score_windows(train_config, task, trainer.optimizer, state, step, *zip(*windows))


def _starts(source: Run, step: int, chosen: set[int]) -> dict[int, list[int]]:
    """By example, where the windows of its visits start, the visit nearest to the checkpoint
    first."""
    visits = [
        visit
        for some in source.visits("start")
        for visit in zip(some["step"].tolist(), some["place"].tolist(), some["start"])
        if visit[1] in chosen
    ]
    found: dict[int, dict[int, None]] = {}
    for _, place, start in sorted(visits, key=lambda visit: abs(visit[0] - step)):
        found.setdefault(place, {})[int(start)] = None
    return {place: list(own) for place, own in found.items()}


def _rows(source: Run, task: TextTask, found: Windows, groups: Any) -> Iterator[dict[str, Any]]:
    """One row per validation set, window and token."""
    for which, lists in groups.items():
        k = source.sets.index(which)
        chosen = {index: None for _, indices in lists for index in indices}
        for index in chosen:
            pieces = task.pieces(index)
            for row in np.flatnonzero(found.indices == index):
                start = int(found.starts[row])
                for position in range(found.counts[row]):
                    yield {
                        "set": which,
                        "id": task.examples.id(index),
                        "start": start,
                        "position": position,
                        "token": start + position,
                        "text": pieces[start + position],
                        "score": found.scores[k, row, position],
                        "error": found.errors[k, row, position],
                    }


def _texts(source: Run, task: TextTask, found: Windows, groups: Any) -> list[heat.Section]:
    sections = []
    for which, lists in groups.items():
        k = source.sets.index(which)
        titled = []
        for title, indices in lists:
            windows = []
            for index in indices:
                pieces = task.pieces(index)
                example = task.examples[index]
                windows += [
                    heat.Window.of(example, pieces, found, k, row)
                    for row in np.flatnonzero(found.indices == index)
                ]
            titled.append((title, windows))
        sections.append(heat.Section(which, titled))
    return sections
