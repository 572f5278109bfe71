"""One small run, shared: compiling is most of its time."""

import json
import signal

import jax
import pytest

from ghostjax.runs.commands.train import run
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.store.run import read_run

STEPS, BATCH_SIZE, VAL_BATCH_SIZE, LENGTH = 6, 4, 2, 16


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that look at the run are on one worker, so that it is made once."""
    for item in items:
        if "micro_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("micro_run"))


@pytest.fixture(scope="session")
def write_data(tmp_path_factory):
    """Writes ``{name: content}`` and gives the paths, by name."""

    def write(**contents):
        folder = tmp_path_factory.mktemp("data")
        paths = {}
        for name, content in contents.items():
            stem, suffix = name.rsplit("_", 1)
            paths[name] = folder / f"{stem}.{suffix}"
            if isinstance(content, bytes):
                paths[name].write_bytes(content)
            else:
                paths[name].write_text(content)
        return paths

    return write


@pytest.fixture(scope="session")
def micro_config(tmp_path_factory, write_data):
    """A run on own data of two domains, five documents each, one longer than a window."""
    lines = [json.dumps({"text": f"line {n} of the forum, " * (n + 1)}) for n in range(5)]
    blocks = [f"block {n}\nof the wiki" for n in range(5)]
    paths = write_data(
        forum_jsonl="\n".join(lines),
        wiki_txt="\n\n".join(blocks),
        held_txt="\n\n".join(f"{n} of the forum and of the wiki" for n in range(4)),
        other_txt="\n\n".join(f"{n} of quite another kind" for n in range(3)),
    )
    return TrainConfig(
        out=tmp_path_factory.mktemp("runs") / "micro",
        model="micro",
        train=(paths["forum_jsonl"], paths["wiki_txt"]),
        val=(f"held={paths['held_txt']}", f"other={paths['other_txt']}"),
        steps=STEPS,
        batch_size=BATCH_SIZE,
        val_batch_size=VAL_BATCH_SIZE,
        length=LENGTH,
        order=1,  # compiles faster
        audit_every=2,
        checkpoint_every=4,
        mesh="data=1",  # of the tests' eight devices
        quiet=True,
    )


@pytest.fixture(scope="session")
def micro_run(micro_config):
    # optax.adamw raises a Python float to the power of an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        run(micro_config)
    return read_run(micro_config.out)


@pytest.fixture
def not_ignored():
    """Ctrl-C as in the foreground; where the tests run in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
