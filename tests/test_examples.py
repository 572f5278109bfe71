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
    "pretrained": ["--batch-size", "2", "--val-batch-size", "2", "--mesh", "data=1"],
}


# One of a model in Flax and one of a loader, where time matters.
QUICK = ("nnx_model", "grain_loader")


# wordllama's own dependencies warn; ours are errors still.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in NAMES]
)
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


# What each must come to on a few steps.
SCRIPTS = {
    "gpt_nnx": ({"steps": 40}, lambda found: found["code"] > 2 * abs(found["prose"])),
    "vit_equinox": ({"steps": 50}, lambda found: found["wrong"] < 0 < found["right"]),
    "lora": (
        {"steps": 20},
        lambda found: (
            found["animals"] > 0 > found["money"]
            and found["val_loss_after"] < found["val_loss_before"]
        ),
    ),
    "ppo": (
        {"updates": 12},
        lambda found: (
            found["reward_last"] > found["reward_first"] + 0.1
            and abs(found["predicted"] - found["actual"]) < 0.2 * found["actual"]
        ),
    ),
    "dp_sgd": ({"steps": 40}, lambda found: found["accuracy"] > 0.9),
    "online_selection": (
        {"steps": 40},
        lambda found: (
            found["wrong_by_score"] < 0.05 < 0.15 < found["wrong_at_random"]
            and found["test_loss_by_score"] < found["test_loss_at_random"]
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name, standard_promotion):
    needs = {"vit_equinox": "equinox", "lora": "wordllama"}
    if name in needs:
        pytest.importorskip(needs[name], reason=f"{needs[name]} is in the extra test")
    options, is_right = SCRIPTS[name]
    found = importlib.import_module(f"examples.{name}").main(**options)
    assert is_right(found), found


def test_examples_are_those_the_readme_promises():
    assert set(NAMES) == {
        *("nnx_model", "equinox_model", "pretrained", "accumulation", "grain_loader")
    }
    with_main = {path.stem for path in FOLDER.glob("*.py") if "def main" in path.read_text()}
    assert with_main == set(SCRIPTS)
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 120
