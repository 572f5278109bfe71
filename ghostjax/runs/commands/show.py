"""``ghostjax show``: what made the value of one training example, visit by visit."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ghostjax.runs.analysis.values import read_values, weights_of_steps
from ghostjax.runs.commands.options import check_choice, check_count, check_formats
from ghostjax.runs.commands.sources import read_task
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.task import LoadedTask
from ghostjax.runs.data.text import TextTask
from ghostjax.runs.errors import UsageError
from ghostjax.runs.report import output
from ghostjax.runs.store.run import Run, find, read_run
from ghostjax.runs.training.trainer import val_choice

MAX_HELD_OUT = 20  # in the printed table
EXCERPT = 120  # characters of a held-out example's window


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Shows what made the value of one training example, visit by visit.

        ghostjax show run wiki:4
        ghostjax show run wiki:4 --set prose --count 5
        ghostjax show run wiki:4 --csv > visits.csv
        ghostjax show run wiki:4 --json | jq '.[0].val_examples[].id'

    The value is the sum, over the visits that were scored, of weight times score. The weight is
    that of the step: 1, but where much more was predicted than happened. Below the visits are the
    held-out examples that the validation gradients of these steps were taken of, those of most
    steps first.

    --csv and --json print one row per validation set and visit, in the order of the steps: set,
    step, row (its place in the batch), loss, norm (of its gradient, where the run has it),
    learning_rate, score, error, weight, value (so far), start and end (the tokens of the window
    that was scored), window (their text) and val_examples: the held-out examples of the step, in
    CSV as JSON, each with its id, place in the validation set from 0, start (the first token of the
    window that the step saw; 0 for arrays) and excerpt (how this window begins). What one of them
    had in the score is not in the log. Windows and val_examples need the files that the run was
    started with; where these are not there, they are empty, and a line says why.

    Attributes:
      run: The run directory.
      id: The training example.
      set: The validation set. None: each of them.
      count: Only so many visits, those that count most. None: all.
      csv: Print CSV.
      json: Print JSON.
      quiet: Print the table without notes.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    set: str | None = None
    count: int | None = None
    csv: bool = False
    json: bool = False
    quiet: bool = False

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        check_count(self.count)
        check_formats(self.csv, self.json)


def run(config: ShowConfig) -> None:
    """Prints the visits.

    Raises:
      UsageError: an option, or the run directory, cannot be used, or there is no such example.
    """
    config.check()
    source = read_run(config.run)
    check_choice("validation set", config.set, list(source.sets))
    place = int(find([config.id], source.ids)[0])
    if place < 0:
        raise UsageError(
            f"no training example {config.id!r} in {source.path}; ghostjax rank {source.path} "
            "--csv lists their ids"
        )
    sets = [config.set] if config.set else list(source.sets)
    visits = _visits(source, place, sets)
    if not len(visits["step"]):
        raise UsageError(f"{config.id} was not visited so far, so it has no value")
    found, note = None, ""
    try:
        found = read_task(source)
    except UsageError as error:
        note = f"No windows and validation examples: {error}"
    rows = {name: list(_rows(source, name, place, visits, found)) for name in sets}
    if config.count is not None:
        rows = {name: _most(own, config.count) for name, own in rows.items()}
    every = [row for own in rows.values() for row in own]
    if note and not config.quiet:
        output.print_text(output.make_console(sys.stderr), note)
    if config.csv:
        output.print_csv({**row, "val_examples": _as_json(row["val_examples"])} for row in every)
    elif config.json:
        output.print_json(every)
    else:
        for name, own in rows.items():
            _print(source, config, name, place, own)


def _most(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The visits that count most, in their order."""
    sizes = np.abs([row["weight"] * row["score"] for row in rows])
    kept = np.argsort(-np.nan_to_num(sizes), kind="stable")[:count]
    return [rows[n] for n in sorted(kept)]


def _as_json(val_examples: list[dict[str, Any]] | None) -> str | None:
    return None if val_examples is None else json.dumps(val_examples)


def _visits(source: Run, place: int, sets: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of the log for the visits of one example, and ``row``, its place in the batch."""
    columns = ["loss", "norm", "learning_rate", "start"]
    columns += [f"{what}_{name}" for name in sets for what in ("score", "error")]
    found = []
    for some in source.visits(*columns):
        some["row"] = np.arange(len(some["step"])) - np.searchsorted(some["step"], some["step"])
        found.append({name: own[some["place"] == place] for name, own in some.items()})
    return {name: np.concatenate([some[name] for some in found]) for name in found[0]}


def _rows(
    source: Run,
    name: str,
    place: int,
    visits: dict[str, np.ndarray],
    found: tuple[TrainConfig, LoadedTask] | None,
) -> Iterator[dict[str, Any]]:
    _, task = found or (None, None)
    held_out = None if found is None else _held_out(*found, name)
    pieces = task.pieces(place) if isinstance(task, TextTask) else None
    weights, value = weights_of_steps(source, name), 0.0
    scores, errors = (visits[f"{what}_{name}"] for what in ("score", "error"))
    for n, step in enumerate(visits["step"].tolist()):
        start = None if np.isnan(visits["start"][n]) else int(visits["start"][n])
        is_scored = bool(np.isfinite(scores[n]))
        value += weights[step] * scores[n] if is_scored else 0.0
        end = min(start + task.length + 1, len(pieces)) if pieces is not None else None
        val_examples = held_out(step) if held_out is not None and is_scored else None
        yield {
            "set": name,
            "step": step,
            "row": int(visits["row"][n]),
            "loss": visits["loss"][n],
            "norm": visits["norm"][n],
            "learning_rate": visits["learning_rate"][n],
            "score": scores[n],
            "error": errors[n],
            "weight": weights[step] if is_scored else np.nan,
            "value": value,
            "start": start,
            "end": end,
            "window": None if pieces is None else "".join(pieces[start:end]),
            "val_examples": val_examples,
        }


def _held_out(
    config: TrainConfig, task: LoadedTask, name: str
) -> Callable[[int], list[dict[str, Any]]]:
    """Of a step, the examples of a validation set that it took."""

    @functools.cache
    def pieces(place: int) -> list[str]:
        return task.val_pieces(name, place)

    def of_step(step: int) -> list[dict[str, Any]]:
        places, rng = val_choice(config, name, task.val_sizes[name], step)
        examples = [task.val_examples[name][place] for place in places]
        starts, excerpts = np.zeros(len(places), int), [one.excerpt for one in examples]
        if isinstance(task, TextTask):
            starts = task.val_starts(name, places, rng)
            windows = (
                pieces(place)[start : start + task.length + 1]
                for place, start in zip(places.tolist(), starts)
            )
            excerpts = ["".join(window)[:EXCERPT] for window in windows]
        return [
            {"id": one.id, "place": int(place), "start": int(start), "excerpt": excerpt}
            for one, place, start, excerpt in zip(examples, places, starts, excerpts)
        ]

    return of_step


def _print(source: Run, config: ShowConfig, name: str, place: int, rows: list[Any]) -> None:
    console = output.make_console(sys.stdout)
    valued = read_values(source)[name].select(np.array([place]))
    right = {"justify": "right"}
    columns = {"step": right, "rate": right, "loss": right, "score": right, "weight": right}
    columns |= {"value so far": right, "tokens": right, "window": {"ratio": 1}}
    table = output.plain_table(f"{config.id}: validation set {name}", columns, console)
    for row in rows:
        is_scored = bool(np.isfinite(row["score"]))
        table.add_row(
            str(row["step"]),
            _figure(row["learning_rate"], ".1e"),
            _figure(row["loss"], ".3f"),
            output.with_error(row["score"], row["error"], console) if is_scored else "not scored",
            f"{row['weight']:.2f}" if is_scored else "-",
            f"{row['value']:+.2e}",
            "" if row["end"] is None else f"{row['start']}..{row['end']}",
            output.plain_cell(row["window"] or "", console),
        )
    console.print(table)
    told = f"{valued.visits[0]} scored visits, {valued.verdicts[0]}"
    if valued.visits[0]:
        value = output.with_error(valued.values[0], valued.errors[0], console)
        told += f": value {value}"
    if not config.quiet:
        output.print_text(console, f"{told}, in {source.unit}\n")
    if any(row["val_examples"] for row in rows):
        console.print(
            _table_of_held_out(f"Held-out examples of these steps: {name}", rows, console)
        )


def _table_of_held_out(title: str, rows: list[Any], console: Console) -> Table:
    steps: dict[int, list[int]] = {}  # by place, as ids may be there twice
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        for one in row["val_examples"] or ():
            steps.setdefault(one["place"], []).append(row["step"])
            first.setdefault(one["place"], one)
    order = sorted(steps, key=lambda place: -len(steps[place]))
    columns = {"id": {"max_width": 32}, "of steps": {"max_width": 32}}
    columns |= {"first window": {"ratio": 1}}
    table = output.plain_table(title, columns, console)
    for place in order[:MAX_HELD_OUT]:
        cells = first[place]["id"], ", ".join(map(str, steps[place])), first[place]["excerpt"]
        table.add_row(*(output.plain_cell(cell, console) for cell in cells))
    if len(order) > MAX_HELD_OUT:
        table.caption = f"and {len(order) - MAX_HELD_OUT} more; --json has all of them"
    return table


def _figure(number: float, form: str) -> str:
    return f"{number:{form}}" if np.isfinite(number) else "-"
