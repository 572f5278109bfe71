"""Tables for the pages, from benchmarks' results and docstrings: ``<!-- table: name -->``."""

import ast
import functools
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!-- table: (\w+) -->")

DIRECTIONS = {
    "the validation gradient itself": "plain",
    "`through_optimizer`": "optimizer, current gradient",
    "`through_optimizer` of `midpoint`": "optimizer, current gradient, midpoint",
    "`through_optimizer` of `look_ahead`": "optimizer, current gradient, look-ahead",
}
METHODS = {
    "plain step": "plain step",
    "plain step and validation gradient": "+ validation gradient",
    "`value_grad_and_dots`": "value_grad_and_dots",
    "`value_and_dots_fn`": "late direction",
}


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["result"]


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fidelity() -> str:
    """Correlation of scores with what leaving a row's share out really changes."""
    found = result("ground_truth")

    def cell(optimizer, key):
        share = found[optimizer][key]["share"]
        return f"{share['pearson median']:.3f} ({share['pearson 10%']:.2f})"

    rows = [[name, *(cell(o, key) for o in found)] for name, key in DIRECTIONS.items()]
    return rows_of(["direction", *found], rows)


def staleness() -> str:
    """Correlation of scores with the effect of leaving out a row, by the gradient's age."""
    found = result("staleness")

    def cell(run, age):
        figures = found[run]["validation gradient"][age]
        return "{mean:.2f} ({10%:.2f})".format(**figures["with effect"])

    ages = next(iter(found.values()))["validation gradient"]
    rows = [[age, *(cell(run, age) for run in found)] for age in ages]
    return rows_of(["steps old", *found], rows)


def cost() -> str:
    """Of one step on a GPT-2 shape."""
    found = result("dots_cost")["B 8, V 8"]
    rows = [
        [
            name,
            f"{found[key]['gflop']:.1f}",
            f"{found[key]['scratch_mib']:.0f}",
            f"{found[key]['time']:.2f}",
        ]
        for name, key in METHODS.items()
    ]
    return rows_of(["", "GFLOP", "scratch MiB", "time / plain step"], rows)


def files_of(folder: str) -> str:
    """What every file of a folder is for, as its docstring's first paragraph says."""
    rows = []
    for path in sorted((ROOT / folder).glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        rows.append([f"`{path.name}`", " ".join(said.partition("\n\n")[0].split())])
    return rows_of(["file", "what is in it"], rows)


TABLES = {
    "fidelity": fidelity,
    "staleness": staleness,
    "cost": cost,
    "files": functools.partial(files_of, "ghostjax"),
    "core": functools.partial(files_of, "ghostjax/core"),
}


def filled(markdown: str) -> str:
    """A page with its tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)
