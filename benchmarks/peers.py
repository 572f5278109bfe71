"""Claim: exact where others leave something out, at a cost that stands beside theirs.

Dots, squared norms and clipped gradients by dattri-llm, Opacus, BackPACK, jax_privacy, optax,
kfac-jax and ghostjax on the same models. Errors first: against every row's gradient by itself, in
float64, in the peer's own framework, on small models that each use their parameters in one way.
Then time (medians of warm runs that take turns) and the rise of resident memory, over a plain step
of the same framework. A process a peer, two threads each.

    python -m benchmarks.peers [peers ...]
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks._common import save
from benchmarks._peers.harness import THREADS

PEERS = ("ghostjax", "dattri_llm", "opacus", "backpack", "jax_privacy", "optax", "kfac_jax")
ROOT = pathlib.Path(__file__).parent.parent


def run(peer: str) -> dict:
    """What the peer's own process reports; the cores it may use are as many as its threads."""
    settings = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS)),
        "OMP_WAIT_POLICY": "passive",  # who waits does no work
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, "-m", f"benchmarks._peers.{peer}", str(out)],
            cwd=ROOT,
            env=os.environ | settings,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            check=True,
        )
        return json.loads(out.read_text())


def main(chosen):
    sizes = {}
    for peer in chosen:
        result = run(peer)
        print(f"{peer}: {result.get('missing', 'done')}\n", flush=True)
        for work, size in result.get("parameters", {}).items():
            assert sizes.setdefault(work, size) == size, f"{peer} has another {work}"
        if "missing" not in result:
            save("peers", {peer: result}, keep=True)


if __name__ == "__main__":
    main(sys.argv[1:] or PEERS)
