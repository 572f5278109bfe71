"""What is shipped, and what an import costs."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import ghostjax
from ghostjax._extras import WITH_EXTRAS

ROOT = pathlib.Path(__file__).parent.parent
LIBRARIES = ("jax", "flax", "optax")
# Which of these come with the libraries that are needed is theirs to say.
HEAVY = (
    *("matplotlib", "orbax", "pyarrow", "rich", "scipy", "tokenizers", "tyro", "equinox"),
    "ghostjax.runs",
)


def imported_by(statement: str) -> set[str]:
    """Of the modules that matter here, those that are loaded after the statement."""
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {*LIBRARIES, *HEAVY} & set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import ghostjax", "import ghostjax.cli"])
def test_the_package_itself_loads_nothing(statement):
    assert imported_by(statement) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["from ghostjax import value_grad_and_dots", "from ghostjax import *"]
)
def test_public_names_load_their_libraries_and_no_more(statement):
    assert imported_by(statement) == imported_by("import jax, flax.linen, optax")


@pytest.mark.slow
def test_what_is_loaded_is_seen():
    assert {"jax", "pyarrow"} <= imported_by("import jax, pyarrow")


def named_files(text: str) -> list[str]:
    """Files and folders of the project that are named in backquotes."""
    folders = r"ghostjax|tests|models|docs|benchmarks|\.ci"
    return re.findall(rf"`((?:{folders})/[\w./]*|[A-Z]+\.md)`", text)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/pages/design.md"])
def test_files_that_contributors_are_sent_to_exist(page):
    found = named_files((ROOT / page).read_text())
    assert len(found) > 10
    assert [name for name in found if not (ROOT / name).exists()] == []


def test_a_file_that_is_not_there_would_be_noticed():
    assert named_files("see `ghostjax/core/nothing.py`") == ["ghostjax/core/nothing.py"]


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("RULES", "ghostjax/core/place_rules.py"),
        ("lost", "ghostjax/core/place_rules.py"),
        ("KINDS", "ghostjax/core/routes.py"),
        ("_kind", "ghostjax/core/routes.py"),
        ("sums_and_gradient", "ghostjax/core/routes.py"),
        ("Route", "ghostjax/core/meeting.py"),
        ("on_loss", "ghostjax/_face.py"),
        ("commands", "ghostjax/cli.py"),
    ],
)
def test_what_contributors_are_sent_to_is_there(word, file):
    assert f"`{word}" in (ROOT / "CONTRIBUTING.md").read_text()
    assert re.search(rf"\b(def |class )?{word}\b( =|:|\()", (ROOT / file).read_text())


def test_extras_that_contributors_install_are_there():
    lists = re.findall(r"-e \"\.\[([\w,]+)\]\"", (ROOT / "CONTRIBUTING.md").read_text())
    extras = {name for names in lists for name in names.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras
    assert extras <= project["optional-dependencies"].keys()


def test_the_type_checker_is_told_that_there_are_types():
    assert (pathlib.Path(ghostjax.__file__).parent / "py.typed").exists()
    names = [*ghostjax.__all__, *WITH_EXTRAS]
    script = (ROOT / "tests" / "typing" / "user_script.py").read_text()
    assert [name for name in names if not re.search(rf"\b{name}\b", script)] == []


def test_the_citation_has_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation


def test_the_smallest_versions_are_those_of_the_package():
    found = subprocess.run(
        [sys.executable, ".ci/floors", "train"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["train"]
    assert found == [line.replace(">=", "==") for line in asked]
