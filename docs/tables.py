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
FLOOR = "+ validation gradient"
METHODS = {
    "plain step": "plain step",
    "plain step + validation gradient, the floor of any exact method": FLOOR,
    "`value_grad_and_dots` with that gradient": "value_grad_and_dots",
    "the same with six directions": "... K = 6 directions",
    "`value_and_dots_fn`, the direction later": "late direction",
    "the same through clipping and AdamW, at the current gradient": "late, AdamW, clipping",
    "`GradDotProdEngine`, 8 + 8 rows (a run of its own)": "engine",
    "`jax.jvp` of the row losses, and the step": "jvp of row losses",
    "`vmap(grad)`": "vmap(grad)",
    "`micro_grad` of optax": "micro_grad",
    "`lax.scan` over rows, one gradient at a time": "scan over rows",
}
LOOPS = {"... K = 6 directions", "micro_grad", "scan over rows"}
NOISES = {
    "bytes of a row shuffled": "shuffled",
    "four bytes repeated": "boilerplate",
    "no noise": "none",
}
SELECTIONS = {
    "16 at random": "random",
    "the same, 64 clean rows among the candidates": "random, clean rows too",
    "all 32": "all 32",
    "low loss": "low loss",
    "large gradient": "gradient norm",
    "score, plain": "score, plain",
    "score, through AdamW": "score, through AdamW",
    "score, plain, without embedding and head": "score, plain, no head",
    "greedy": "greedy",
}
CLIPPED = {
    "GPT-2 shape, T 128, B 16": "GPT-2 shape, B 16",
    "the same, B 256": "GPT-2 shape, B 256",
    "T 16, B 128": "GPT-2 shape, T 16, B 128",
    "6 layers, scan + remat, B 16": "GPT-2 shape, 6 layers, scan+remat, B 16",
    "CNN, B 256": "CNN, B 256",
    "MLP, B 256": "MLP, B 256",
}
CLIPPING = {
    "`value_and_clipped_grad`": "value_and_clipped_grad",
    "`jax_privacy.clipped_grad`": "jax_privacy",
    "the same, row by row": "jax_privacy, row by row",
    "optax's aggregation of `vmap(grad)`": "optax of vmap(grad)",
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
    """Of one step on a GPT-2 shape. XLA counts one round of a loop."""
    found = result("dots_cost")["B 8, V 8"]
    found["engine"] = result("engine_cost")["B 8, V 8"]["engine"]

    def flops(key):
        return "(not counted in loops)" if key in LOOPS else f"{found[key]['gflop']:.1f}"

    rows = [
        [name, flops(key), f"{found[key]['scratch_mib']:.0f}", f"{found[key]['time']:.2f}"]
        for name, key in METHODS.items()
    ]
    return rows_of(["", "GFLOP", "scratch MiB", "time / plain step"], rows)


def cost_over_floor() -> str:
    """Of steps of several shapes, over a plain step and a validation gradient."""
    found = result("dots_cost")
    rows = [
        [
            name,
            *(
                f"{shape[key]['over_floor']:.2f}" if key in shape else ""
                for shape in found.values()
            ),
        ]
        for name, key in METHODS.items()
        if key not in ("plain step", FLOOR, "engine")
    ]
    return rows_of(["", *found], rows)


def selection() -> str:
    """Test loss by what is trained on, and where its difference from random rows is not noise."""
    found = result("selection")

    def cell(figures):
        low, high = figures.get("its interval", (0, 0))
        mark = " ↑" if low > 0 else " ↓" if high < 0 else ""
        return f"{figures['loss']:.2f}{mark}"

    def cells(method):
        for noise in NOISES.values():
            row = found[noise][method]
            yield f"{cell(row['equal compute'])} / {cell(row['equal steps'])}"

    rows = [
        [name, f"{found['none'][method]['cost']:.1f}", *cells(method)]
        for name, method in SELECTIONS.items()
    ]
    return rows_of(["trained on", "plain steps' cost", *NOISES], rows)


def clipping() -> str:
    """Time and memory of clipped gradients over those of a plain step."""
    found = result("clipping")

    def cell(row):
        figures = row["time"], row["memory"]
        return " / ".join(f"{figure:.{2 if figure < 10 else 0}f}" for figure in figures)

    rows = [
        [name, *(cell(found[shape][key]) for shape in CLIPPED.values())]
        for name, key in CLIPPING.items()
    ]
    return rows_of(["", *CLIPPED], rows)


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
    "selection": selection,
    "cost_over_floor": cost_over_floor,
    "files": functools.partial(files_of, "ghostjax"),
    "core": functools.partial(files_of, "ghostjax/core"),
    "errors_of_peers": errors_of_peers,
    "costs_of_peers": costs_of_peers,
}
README = ROOT / "README.md"
OF_README = {"cost": cost, "clipping": clipping, "peers": summary_of_peers}
IN_README = re.compile(r"(<!-- docs/tables.py: (\w+) -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def filled(markdown: str) -> str:
    """A page with its tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def current(readme: str) -> str:
    """The README with the tables that the results give now."""
    return IN_README.sub(lambda found: found[1] + OF_README[found[2]](), readme)


if __name__ == "__main__":
    README.write_text(current(README.read_text()))
