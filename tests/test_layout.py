"""Imports point from higher rank to lower, files stay short, and private JAX stays out."""

import ast
import pathlib

import pytest

import ghostjax

ROOT = pathlib.Path(ghostjax.__file__).parent
RANKS = {
    "_aggregate": 1,
    "_audit": 1,
    "_errors": 0,
    "_checks": 2,
    "_collectives": 0,
    "_modules": 1,
    "_jaxprs": 1,
    "_flops": 2,
    "_scalars": 2,
    "core": 2,
    "_explanation": 4,
    "_face": 5,
    "_predictions": 1,
    "_loss": 3,
    "_labels": 4,
    "_dots": 5,
    "_dtypes": 0,
    "_engine": 6,
    "_kinds": 1,
    "_late": 6,
    "_log": 2,
    "_explain": 9,
    "_explained_memory": 7,
    "_explained_norms": 8,
    "_memory": 3,
    "_placement": 0,
    "_step_memory": 0,
    "_early": 8,
    "_norm_costs": 3,
    "_norms": 8,
    "_pairs": 8,
    "_row_gradients": 7,
    "_rowwise": 3,
    "_types": 2,
    "_through": 3,
    "_task": 1,
    "_run": 11,
    "directions": 4,
    "testing": 1,
    "linen": 3,
    "fidelity": 5,
    "values": 4,
    "selection": 9,
    "runs": 10,
    "cli": 11,
    "__main__": 12,
    "_public": 12,
    "_extras": 11,
    "": 13,  # the package itself re-exports
}
# The rooms of ghostjax.runs, and which others each may import.
ROOMS = {
    "blocks": (),
    "listed": ("blocks",),
    "mapped": ("errors",),
    "errors": (),
    "models": (),
    "processes": ("errors",),
    "store": ("errors", "listed", "mapped", "processes"),
    "config": ("errors", "models", "store"),
    "data": ("blocks", "errors", "listed", "mapped", "models", "config"),
    "training": ("errors", "models", "config", "data", "analysis"),
    "analysis": ("errors", "mapped", "store"),
    "loop": ("errors", "listed", "store", "analysis"),
    "report": ("blocks", "errors", "config", "store", "data", "training", "analysis"),
    "commands": (
        "errors",
        "processes",
        "config",
        "store",
        "data",
        "training",
        "analysis",
        "loop",
        "report",
    ),
}
EXTRAS = (
    "jinja2",
    "markupsafe",
    "orbax",
    "pyarrow",
    "rich",
    "scipy",
    "tensorboardX",
    "tokenizers",
    "tyro",
)
# What rich itself calls may import it there, and only there.
INSIDE_FUNCTIONS = {"_explanation": "rich"}
FILES = sorted(ROOT.rglob("*.py"))


def component(module: str) -> str:
    """ghostjax.linen._engine -> linen"""
    return [*module.split("."), ""][1]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room(module: str) -> str:
    """ghostjax.runs.store.log -> store"""
    return [*module.removeprefix("ghostjax.runs").split("."), ""][1]


def outside_functions(tree: ast.AST) -> list[ast.AST]:
    """The nodes that run when a module is imported."""
    found = [tree]
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += outside_functions(node)
    return found


def imported_modules(source: str, *, everywhere: bool = True) -> set[str]:
    found, tree = set(), ast.parse(source)
    for node in ast.walk(tree) if everywhere else outside_functions(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A module that is imported from the package is no use of the package itself.
            if node.module != "ghostjax" or not all(component(name) in RANKS for name in names):
                found.add(node.module or ".")
            found.update(names)
    return found


def breaches(module: str, source: str) -> list[str]:
    """Imports of ``module`` that its rank does not allow."""
    own = component(module)
    found = []
    at_once = imported_modules(source, everywhere=False)
    for name in imported_modules(source):
        package = name.split(".")[0]
        if package == "ghostjax":
            target = component(name)
            if target in RANKS and target != own and RANKS[target] >= RANKS[own]:
                found.append(name)
            if target == own == "runs" and room(module):
                inside = room(name) or "the package itself"
                if inside not in (room(module), *ROOMS[room(module)]):
                    found.append(name)
        if package == "flax" and own not in ("linen", "runs"):
            found.append(name)
        if name.startswith("jax._src"):
            found.append(name)
        later = package == INSIDE_FUNCTIONS.get(own) and name not in at_once
        if package in EXTRAS and own not in ("runs", "cli") and not later:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    assert component(module_name(path)) in RANKS, "a new module needs a rank"
    assert room(module_name(path)) in ("", *ROOMS) or component(module_name(path)) != "runs"
    assert breaches(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ghostjax._checks", "from ghostjax.linen import GradDotProdEngine"),
        ("ghostjax.linen._plan", "import ghostjax.runs.training.trainer"),
        ("ghostjax.core.channel", "import flax.linen as nn"),
        ("ghostjax.linen._plan", "from jax._src import core"),
        ("ghostjax.linen._plan", "import pyarrow"),
        ("ghostjax.testing", "from ghostjax._types import EngineResult"),
        ("ghostjax.testing", "from ghostjax import values"),
        ("ghostjax.values", "from ghostjax import aggregate"),
        ("ghostjax.runs.store.log", "from ghostjax.runs.training.step import StepRecord"),
        ("ghostjax.runs.analysis.values", "import ghostjax.runs.training.trainer"),
        ("ghostjax.runs.analysis.scale", "from ghostjax.runs.report import pictures"),
        ("ghostjax.runs.data.text", "from ghostjax.runs import TrainConfig"),
        ("ghostjax.runs.report.page", "from ghostjax.runs.commands.rank import run"),
        ("ghostjax._explanation", "import rich"),
        ("ghostjax._explanation", "class Table:\n    from rich.table import Table"),
        ("ghostjax._explanation", "def f():\n    import pyarrow"),
        ("ghostjax._explain", "def f():\n    from rich.table import Table"),
        (
            "ghostjax._explanation",
            "from rich.table import Table\n\ndef f():\n    from rich.table import Table",
        ),
    ],
)
def test_a_breach_is_found(module, source):
    assert breaches(module, source)


def test_what_is_imported_when_rich_asks_is_no_breach():
    source = "class A:\n    def __rich__(self):\n        from rich.table import Table"
    assert breaches("ghostjax._explanation", source) == []


# Shared models live in ``models``; who may not import whom.
STRANGERS = {
    "tests": ("benchmarks",),
    "benchmarks": ("tests",),
    "models": ("benchmarks", "tests"),
    "ghostjax": ("benchmarks", "models", "tests"),
}


def strangers(folder, source):
    return [name for name in imported_modules(source) if name.split(".")[0] in STRANGERS[folder]]


@pytest.mark.parametrize("folder", STRANGERS)
def test_tests_benchmarks_and_the_package_stand_alone(folder):
    files = sorted((pathlib.Path(__file__).parents[1] / folder).rglob("*.py"))
    assert files
    found = {str(path): strangers(folder, path.read_text()) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_stranger_is_found():
    assert strangers("tests", "from benchmarks import run_cost")
    assert strangers("benchmarks", "def f():\n    import tests.dots.checks")
