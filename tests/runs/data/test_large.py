"""Data larger than memory: what a document costs is counted in bytes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
DOCUMENTS, FEW, SHARDS = 1_000_000, 200_000, 20
# Of anonymous memory, for a document more than few, behind which the blocks are full in which files
# are read. Measured: none, 8, 17, 23 and 56; between runs they differ by ten.
BYTES = {"train": 30, "rank": 30, "report": 40, "tensorboard": 50, "diff": 100}
PEAK = """
import pathlib, sys, threading
from ghostjax.cli import main
most, over = 0, threading.Event()
def watch():
    global most
    while not over.wait(0.005):
        status = pathlib.Path("/proc/self/status").read_text()
        most = max(most, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
code = main(sys.argv[1:])
over.set()
watcher.join()
print(code, most, file=sys.stderr)
"""


def write_shards(folder, count):
    folder.mkdir()
    for shard in range(SHARDS):
        own = range(shard * count // SHARDS, (shard + 1) * count // SHARDS)
        lines = (f'{{"text": "document {n} of very many, and what it says"}}\n' for n in own)
        (folder / f"part-{shard:02d}.jsonl").write_text("".join(lines))


def peak(*argv):
    """The most anonymous memory of a command, in bytes: mapped files do not count."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    code, size = found.stderr.split()[-2:]
    assert code == "0", found.stderr
    return int(size)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_million_documents_take_hardly_more_memory_than_few(tmp_path):
    peaks = {}
    # The first compiles, which takes more than all else.
    for name, count in (("first", 1_000), ("few", FEW), ("many", DOCUMENTS)):
        data, out = tmp_path / f"data-{name}", tmp_path / name
        write_shards(data, count)
        options = ["--model", "micro", "--length", 16, "--order", 1, "--steps", 4, "--quiet"]
        options += ["--batch-size", 8, "--val-batch-size", 4, "--mesh", "data=1"]
        options += ["--train", data / "*.jsonl", "--val", tmp_path / "data-first" / "*-0[01].jsonl"]
        peaks[name] = {
            "train": peak("train", "--out", out, *options),
            "rank": peak("rank", out, "--quiet"),
            "report": peak("report", out, "--quiet", "--no-windows"),
            "tensorboard": peak("tensorboard", out, "--quiet"),
            "diff": peak("diff", out, out, "--quiet"),
        }
    of_each = {
        verb: (peaks["many"][verb] - peaks["few"][verb]) / (DOCUMENTS - FEW) for verb in BYTES
    }
    assert all(of_each[verb] <= most for verb, most in BYTES.items()), of_each
    begun = json.loads((tmp_path / "many" / "run.json").read_text())
    assert begun["examples"] == DOCUMENTS
    assert (tmp_path / "many" / "report.html").stat().st_size < 2**21
