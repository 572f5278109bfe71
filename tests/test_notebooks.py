"""The notebooks run from top to bottom, and are kept without outputs."""

import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"


def cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks(path, standard_promotion):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is in the extra docs")
    matplotlib.use("agg")
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), namespace)


def test_notebooks_are_kept_without_outputs():
    paths = list(FOLDER.glob("*.ipynb"))
    assert len(paths) == 2
    assert all(not cell["outputs"] for path in paths for cell in cells(path))
