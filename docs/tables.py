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
PEERS = {
    "ghostjax": "ghostjax",
    "dattri_llm": "dattri-llm",
    "opacus": "Opacus",
    "backpack": "BackPACK",
    "jax_privacy": "jax_privacy",
    "optax": "optax",
    "kfac_jax": "kfac-jax",
}
SILENT, WARNED = "wrong, silently", "wrong, with a warning"
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


def peers() -> dict[str, dict]:
    """The results of each peer that was measured."""
    found = result("peers")
    return {name: found[key] for key, name in PEERS.items()}


def outcome(row: dict) -> str:
    """What was found, with the wrong ones in two kinds."""
    return (WARNED if "says" in row else SILENT) if row["outcome"] == "wrong" else row["outcome"]


def methods_of(peer: dict) -> list[str]:
    return list(next(iter(peer["probes"].values())))


def quantity(peer: dict, method: str) -> str:
    return next(iter(peer["works"].values()))[method]["quantity"]


def power(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-")


def errors_of_peers() -> str:
    """The largest error of a peer on every small model."""

    def cell(rows):
        texts = []
        for row in rows:
            text = power(row["error"]) if "error" in row else "refuses"
            if row["outcome"] == "wrong":
                text = f"**{text}**" + (" (warns)" if "says" in row else "")
            if text not in texts:
                texts.append(text)
        exact = [row["error"] for row in rows if row["outcome"] == "exact"]
        return power(max(exact)) if len(exact) == len(rows) else ", ".join(texts)

    measured = peers()
    names = next(iter(measured.values()))["probes"]
    rows = [
        [name, *(cell(peer["probes"][name].values()) for peer in measured.values())]
        for name in names
    ]
    return rows_of(["parameters in", *measured], rows)


def costs_of_peers() -> str:
    """Time, and memory where it can be told, over a plain step of the same framework."""

    def cell(work, row):
        if "cpu" not in row:
            return "refuses"
        text = f"{row['cpu']:.1f}"
        if work.startswith("GPT-2"):  # elsewhere a few MiB, of which plain steps differ by factors
            text += f" / {row['memory']:.1f}"
        return text + f" (off by {power(row['error'])})" if row["outcome"] == "wrong" else text

    measured = peers()
    works = list(measured["ghostjax"]["works"])
    rows = []
    for peer in measured.values():
        for method in methods_of(peer):
            cells = [cell(work, peer["works"][work][method]) for work in works]
            rows.append([method, quantity(peer, method), *cells])
    return rows_of(["", "", *works], rows)


def summary_of_peers() -> str:
    """How many small models each method has right; what it costs on a GPT-2 shape."""
    rows = []
    for name, peer in peers().items():
        for method in methods_of(peer):
            found = [outcome(models[method]) for models in peer["probes"].values()]
            counts = [str(found.count(kind)) for kind in ("exact", SILENT, WARNED, "refused")]
            work = peer["works"]["GPT-2 shape, head of its own"][method]
            cost = f"{work['cpu']:.1f} / {work['memory']:.1f}" if "cpu" in work else "refused"
            label = f"ghostjax, `{method}`" if name == "ghostjax" else method
            rows.append([label, quantity(peer, method), *counts, cost])
    return rows_of(["", "", "exact", SILENT, WARNED, "refused", "GPT-2 shape"], rows)


TABLES = {
    "fidelity": fidelity,
    "staleness": staleness,
    "cost": cost,
    "files": functools.partial(files_of, "ghostjax"),
    "core": functools.partial(files_of, "ghostjax/core"),
    "errors_of_peers": errors_of_peers,
    "costs_of_peers": costs_of_peers,
}
README = ROOT / "README.md"
IN_README = re.compile(r"(?<=<!-- docs/tables.py -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def filled(markdown: str) -> str:
    """A page with its tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def current(readme: str) -> str:
    """The README with the table that the results give now."""
    return IN_README.sub(lambda _: summary_of_peers(), readme)


if __name__ == "__main__":
    README.write_text(current(README.read_text()))
