"""Every Python snippet of a page runs, in order, as one program; options of commands are real."""

import importlib.util
import inspect
import operator
import pathlib
import re
import shlex
import tomllib
from collections.abc import Callable

import pytest

import ghostjax
from ghostjax._extras import WITH_EXTRAS
from ghostjax.cli import main
from tests.test_readme import snippets

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
REFERENCE = (ROOT / "docs" / "pages" / "reference.md").read_text()


@pytest.mark.quick("many_devices")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page.read_text())], ids=lambda page: page.stem
)
def test_python_snippets(page, standard_promotion):
    namespace = {}
    for snippet in snippets(page.read_text()):
        exec(compile(snippet, str(page), "exec"), namespace)


def unlisted(names) -> list[str]:
    listed = set(re.findall(r"^::: (\S+)$", REFERENCE, flags=re.MULTILINE))
    return [name for name in names if f"ghostjax.{name}" not in listed]


def test_every_public_name_is_in_the_reference():
    own = [f"{module}.{name}" for name, module in WITH_EXTRAS.items()]
    assert unlisted([*ghostjax.__all__, *(name.removeprefix("ghostjax.") for name in own)]) == []


@pytest.mark.parametrize("module", ["directions", "fidelity", "linen", "selection", "testing"])
def test_every_function_of_a_public_module_is_in_the_reference(module):
    members = vars(getattr(ghostjax, module)).items()
    own = (f"ghostjax.{module}", "ghostjax._predictions")
    public = [
        f"{module}.{name}"
        for name, member in members
        if not name.startswith("_")
        and callable(member)
        and inspect.unwrap(member).__module__.startswith(own)
    ]
    assert public
    assert unlisted(public) == []


def test_a_name_that_is_not_there_would_be_noticed():
    assert unlisted(["value_grad_and_dot"]) == ["value_grad_and_dot"]


def public_functions() -> dict[str, Callable]:
    names = re.findall(r"^::: ghostjax\.(\S+)$", REFERENCE, flags=re.MULTILINE)
    found = {name: operator.attrgetter(name)(ghostjax) for name in names if "run_log" not in name}
    return {name: own for name, own in found.items() if inspect.isfunction(inspect.unwrap(own))}


def lacking(function: Callable) -> list[str]:
    """What a docstring does not say, unless its first sentence ends in "as ``other``"."""
    doc = inspect.getdoc(function) or ""
    found = [] if ">>> " in doc else ["an example"]
    if re.search(r"\A[^\n]*(\n[^\n]+)*[Aa]s ``\w+``\.$", doc, flags=re.MULTILINE):
        return found
    names = inspect.signature(function).parameters
    found += [name for name in names if not re.search(rf"^  ([\w, ]+, )?{name}(,|:)", doc, re.M)]
    gives_something = not function.__name__.startswith(("assert_", "register_"))
    return found + ["Returns:"] * (gives_something and "\nReturns:\n" not in doc)


@pytest.mark.parametrize("name", public_functions())
def test_docstrings_of_public_functions_are_complete(name):
    assert lacking(public_functions()[name]) == []


def test_what_a_docstring_lacks_would_be_noticed():
    def half(loss_fn, batch):
        """Half of it.

        Args:
          loss_fn: of the batch.
        """

    assert lacking(half) == ["an example", "batch", "Returns:"]


def commands(text: str) -> list[list[str]]:
    """The lines that call ghostjax: all of bash blocks, and those of scripts that do."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    found = [shlex.split(line) for block in blocks for line in block.splitlines()]
    scripts = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    calls = re.findall(r"\bghostjax (train .*)", "\n".join(scripts))
    return found + [["ghostjax", *call.replace("'", "").split()] for call in calls]


def test_options_of_commands_are_real(capsys):
    found = [command for page in PAGES for command in commands(page.read_text())]
    assert len(found) > 8
    for verb in {command[1] for command in found}:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        described = capsys.readouterr().out
        for command in found:
            if command[1] == verb:
                options = [word for word in command if word.startswith("--")]
                assert [option for option in options if option not in described] == []


def test_commands_in_scripts_are_found():
    script = "```sh\nssh --command '\n  bin/ghostjax train --outt x'\n```\n"
    assert commands(script) == [["ghostjax", "train", "--outt", "x"]]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_filled_from_the_results(tables):
    names = [name for page in PAGES for name in tables.MARK.findall(page.read_text())]
    assert sorted(names) == sorted(tables.TABLES)
    for name in names:
        lines = tables.filled(f"<!-- table: {name} -->").splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) >= 6


def test_the_tables_in_the_readme_are_those_that_the_results_give(tables):
    readme = (ROOT / "README.md").read_text()
    assert all(table() in readme for table in tables.OF_README.values())
    assert tables.current(readme) == readme
    assert tables.current(readme.replace("| refused |", "| refused, or not |")) == readme


def test_peers_were_measured_as_pinned(tables):
    """The extra names the versions that the results are of."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in extras["optional-dependencies"]["peers"])
    measured = {}
    for peer in tables.peers().values():
        measured |= {name: version.split("+")[0] for name, version in peer["versions"].items()}
    assert {name: measured[name] for name in pinned} == pinned
