"""Commands that nobody runs every day still run, at sizes that prove no more than that."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*arguments) -> str:
    command = [sys.executable, "-W", "ignore", "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("more", [["--engine"], ["--remat"]])
def test_the_command_for_one_gpu(more):
    sizes = ["--layers", 1, "--features", 16, "--heads", 2, "--positions", 8, "--vocabulary", 32]
    out = run("benchmarks.published", *sizes, "--rows", 4, "--val-rows", 2, "--repeats", 1, *more)
    assert "value_grad_and_dots" in out
    assert "wrote" not in out  # only the published sizes are results


def test_what_peers_are_measured_by(tmp_path):
    run("benchmarks._peers.ghostjax", tmp_path / "out.json", "embedding tied to the head")
    found = json.loads((tmp_path / "out.json").read_text())["probes"]
    [methods] = found.values()
    assert len(methods) == 4
    assert {row["outcome"] for row in methods.values()} == {"exact"}
