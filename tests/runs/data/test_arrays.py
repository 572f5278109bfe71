"""Classification of arrays, and texts with a tokenizer of their own."""

import dataclasses
import json

import numpy as np
import pytest

from ghostjax.runs.analysis.values import sum_visits
from ghostjax.runs.commands.train import run
from ghostjax.runs.data.arrays import read_arrays
from ghostjax.runs.data.load import load_task
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.run import read_run

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def blobs(count, seed, wrong=0):
    """Two clouds in 2 x 3 pictures; the first ``wrong`` labels are false."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    x = rng.normal(size=(count, 2, 3)) + 2 * y[:, None, None]
    y[:wrong] = 1 - y[:wrong]
    return {"x": x, "y": y}


@pytest.fixture
def config(micro_config, tmp_path):
    np.savez(tmp_path / "noisy.npz", **blobs(64, 0, wrong=16))
    np.savez(tmp_path / "clean.npz", **blobs(32, 1))
    return dataclasses.replace(
        micro_config,
        out=tmp_path / "run",
        train=(tmp_path / "noisy.npz",),
        val=(f"clean={tmp_path / 'clean.npz'}",),
        length=None,
        steps=48,
        batch_size=16,
        val_batch_size=16,
        seed=1,  # of eight seeds, the model of seed 0 learns last
    )


def test_wrong_labels_have_the_smallest_values(config):
    run(config)
    found = read_run(config.out)
    values = sum_visits(found).values
    assert set(found.examples["domain"].to_pylist()) == {"label-0", "label-1"}
    assert found.examples["id"][3].as_py() == "noisy:3"
    assert found.examples["excerpt"][0].as_py().startswith("label ")
    wrong, right = values[:16, 0], values[16:, 0]
    assert (wrong[:, None] < right).mean() > 0.9
    assert found.metadata["kinds"] == ["LayerNorm", "MLP"]


BAD = {
    "no x": ({"y": np.zeros(3, int)}, "no array x in it"),
    "float labels": ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "y must be integers from 0"),
    "negative": ({"x": np.zeros((1, 2)), "y": np.array([-1])}, "y must be integers from 0"),
    "lengths": ({"x": np.zeros((2, 2)), "y": np.zeros(3, int)}, r"x must be numbers, \[3, ...\]"),
    "rank": ({"x": np.zeros(3), "y": np.zeros(3, int)}, "x must be numbers"),
    "objects": ({"x": np.array([[None]]), "y": np.zeros(1, int)}, "not an .npz file of numbers"),
    "no numbers": ({"x": np.zeros((2, 0)), "y": np.zeros(2, int)}, "x must be numbers"),
    "labels": ({"x": np.zeros((1, 2)), "y": np.array([2**32])}, "less than 1048576; found 4294967"),
    "huge": ({"x": np.full((1, 2), 1e300), "y": np.zeros(1, int)}, r"x\[0\] has a number"),
    "nan": ({"x": np.array([[0.0], [np.nan]]), "y": np.zeros(2, int)}, r"x\[1\] has a number"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_files_that_cannot_be_used(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=rf"a\.npz: .*{message}|{message}"):
        read_arrays([tmp_path / "a.npz"])


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(UsageError, match=r"a\.npz: not an \.npz file of numbers"):
        read_arrays([tmp_path / "a.npz"])
    with pytest.raises(UsageError, match=r"none\.npz: No such file"):
        read_arrays([tmp_path / "none.npz"])


def test_damaged_archives_and_lone_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **blobs(64, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:400] + b"\xff" * 20 + whole[420:])
    with pytest.raises(UsageError, match=r"a\.npz: not an \.npz file of numbers"):
        read_arrays([path])
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match=r"a\.npz: not an \.npz file of numbers"):
        read_arrays([path])


def test_files_of_one_name(tmp_path):
    """Their ids would be equal, which a run would notice only when it is over."""
    paths = [tmp_path / "a.npz", tmp_path / "more" / "a.npz"]
    paths[1].parent.mkdir()
    for path in paths:
        np.savez(path, **blobs(4, 0))
    with pytest.raises(UsageError, match=r"a\.npz and .*a\.npz have the same name"):
        read_arrays(paths)
    with pytest.raises(UsageError, match=r"a\\udcff\.npz': ids have its name, no Unicode"):
        read_arrays([tmp_path / "a\udcff.npz"])


def test_files_that_do_not_fit_together(config, tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((40, 7)), y=np.zeros(40, int))
    wide = f"clean={tmp_path / 'wide.npz'}"
    with pytest.raises(UsageError, match="clean: x has 7 numbers per example, but 6 in --train"):
        load_task(dataclasses.replace(config, val=(wide,)))
    with pytest.raises(UsageError, match="texts and arrays do not mix"):
        load_task(dataclasses.replace(config, val=("a.txt",)))
    with pytest.raises(UsageError, match="--tokenizer is for texts"):
        load_task(dataclasses.replace(config, tokenizer=tmp_path / "t.json"))
    with pytest.raises(UsageError, match="--id-field is for texts"):
        load_task(dataclasses.replace(config, id_field="key"))
    with pytest.raises(UsageError, match="--length is for texts"):
        load_task(dataclasses.replace(config, length=16))


def test_a_tokenizer_of_hugging_face(micro_config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "line": 1, "of": 2, "the": 3, "forum": 4, "wiki": 5, "block": 6, "and": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = load_task(dataclasses.replace(micro_config, tokenizer=tmp_path / "tokenizer.json"))
    assert task.init_params(0)["tokens"]["embedding"].shape[0] == len(words)
    # "line 0 of the forum," and "block 0\nof the wiki"
    assert [example.size for example in task.examples][::5] == [6, 5]
    rows, _ = task.train_rows(np.array([5]), np.random.default_rng(0))
    assert rows["inputs"][0, :4].tolist() == [6, 0, 2, 3]
    assert rows["targets"][0, :4].tolist() == [0, 2, 3, 5]


def test_a_vocabulary_with_gaps(micro_config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "forum": 9}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = load_task(dataclasses.replace(micro_config, tokenizer=tmp_path / "tokenizer.json"))
    assert task.init_params(0)["tokens"]["embedding"].shape[0] == 10


def test_tokenizers_that_cannot_be_used(micro_config, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "random.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"random\.json: .* \(dropout 0\.5\), .* to null"):
        load_task(dataclasses.replace(micro_config, tokenizer=tmp_path / "random.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=r"bad\.json: no tokenizer\.json"):
        load_task(dataclasses.replace(micro_config, tokenizer=tmp_path / "bad.json"))
    with pytest.raises(UsageError, match=r"none\.json: no such file"):
        load_task(dataclasses.replace(micro_config, tokenizer=tmp_path / "none.json"))
