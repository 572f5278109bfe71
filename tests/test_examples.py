"""Every example trains, is scored and is resumed; its files are short."""

import importlib
import json
import pathlib

import pytest

import examples
from ghostjax.cli import main

FOLDER = pathlib.Path(examples.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "def task" in path.read_text())
NEEDS = {"equinox_model": "equinox", "grain_loader": "grain", "pretrained": "wordllama"}
MORE = {
    "equinox_model": ["--learning-rate", "0.01"],
    "accumulation": ["--score-every", "2"],
    "pretrained": ["--batch-size", "2", "--val-batch-size", "2"],
}


# wordllama's own dependencies warn; ours are errors still.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, standard_promotion):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is in the extra test")
    command = ["train", "--out", str(tmp_path / "run"), "--quiet"]
    options = ["--task", f"examples.{name}:task", "--steps", "2", "--order", "1"]
    options += MORE.get(name, [])
    if name == "pretrained":
        pytest.importorskip("safetensors", reason="safetensors is in the extra test")
        options += ["--init-from", str(importlib.import_module("examples.pretrained").WEIGHTS)]
    assert main([*command, *options]) == 0
    assert main([*command, "--resume", "--steps", "4"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert main(["rank", str(tmp_path / "run")]) == 0


def test_examples_are_those_the_readme_promises():
    assert set(NAMES) == {
        *("nnx_model", "equinox_model", "pretrained", "accumulation", "grain_loader")
    }
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 120
