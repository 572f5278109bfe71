"""Levanter: its configuration reads what ``ghostjax rank --mixture`` writes, and its own mixture of
data draws by it.

It is published as ``marin-levanter``, for Python 3.12, and is not in the extra ``zoo``, as it asks
for an older optax than ghostjax:

    echo "optax>=0.2.8" > override.txt
    uv pip install --prerelease allow --override override.txt marin-levanter ".[train]" pytest-xdist
"""

import asyncio
import collections
import dataclasses
import json
import pathlib
import warnings

import jax
import pytest

from ghostjax.cli import main
from tests.runs.made_up import DOMAINS, write_run
from tests.test_readme import snippets
from tests.zoo.checks import MARKS, package

pytestmark = MARKS
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "pages" / "selection.md"


@pytest.fixture(scope="module")
def weights_and_data(tmp_path_factory):
    """The weights of a file, and what Levanter makes of the page's configuration beside it."""
    draccus, levanter = package("draccus"), package("levanter.config")
    train_lm = package("levanter.main.train_lm")
    levanter.register_codecs()
    folder = tmp_path_factory.mktemp("levanter")
    path = folder / "weights.json"
    options = ["--set", "code", "--mixture", str(path), "--mixture-rate", "2", "--quiet"]
    assert main(["rank", str(write_run(folder / "run")), *options]) == 0
    [text] = snippets(PAGE.read_text(), "yaml")
    (folder / "train.yaml").write_text(text)
    parsed = draccus.parse(train_lm.TrainLmConfig, config_path=folder / "train.yaml", args=[])
    return json.loads(path.read_text()), parsed.data


def drawn(data, count, **changes):
    """How many of ``count`` rows each domain has in Levanter's mixture, of data in memory."""
    from haliax import Axis
    from levanter.data.dataset import ListAsyncDataset
    from levanter.data.text.datasets import DirectDatasetComponent
    from levanter.schedule import BatchSchedule

    components = {
        name: DirectDatasetComponent(datasets={"train": ListAsyncDataset([name] * 7)})
        for name in data.components
    }
    data = dataclasses.replace(data, components=components, shuffle=False, **changes)
    mixed = data.train_mixture(Axis("position", 8), BatchSchedule(4), key=jax.random.key(0))
    return collections.Counter(asyncio.run(mixed.get_batch(range(count))))


def test_the_file_is_read(weights_and_data):
    weights, data = weights_and_data
    assert data.train_weights == weights
    assert set(data.components) == set(weights) == set(DOMAINS)


def test_rows_are_drawn_by_the_weights(weights_and_data):
    weights, data = weights_and_data
    size = data.mixture_block_size
    with warnings.catch_warnings(action="error"):
        found = drawn(data, size)
    assert {name: found[name] / size for name in weights} == pytest.approx(weights, abs=3 / size)
    assert min(found.values()) > 0


def test_a_small_block_leaves_out_small_shares(weights_and_data):
    """What the page warns of."""
    _, data = weights_and_data
    weights = {"wiki": 0.7, "scripts": 0.2998, "noise": 0.0002}
    assert drawn(data, 65535, train_weights=weights)["noise"] == 13
    with pytest.warns(UserWarning, match="noise has 0 samples in the block"):
        found = drawn(data, 2048, train_weights=weights, mixture_block_size=2048)
    assert set(found) == {"wiki", "scripts"}
