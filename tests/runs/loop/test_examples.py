"""The examples of a loop of one's own: little memory, told apart, read again."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from ghostjax import RunLog
from ghostjax.runs import listed
from ghostjax.runs.errors import UsageError
from ghostjax.runs.loop import places
from ghostjax.runs.loop.examples import Examples
from ghostjax.runs.store.run import read_run


def test_given_examples_take_little_more_memory_than_their_texts():
    count = 5 * listed.BLOCK
    given = {"id": [f"example {n}" for n in range(count)], "domain": ["a"] * count}
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        found = Examples(given)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (taken + pa.total_allocated_bytes() - before) / count < 100
    ids = np.array(["example 7", f"example {count - 1}"], object)
    assert found.check(ids, "strings", {"domain": ["a", "a"]}) == {}
    with pytest.raises(ValueError, match=f"example {count - 1}': its domain is 'b', but was 'a'"):
        found.check(ids, "strings", {"domain": ["a", "b"]})
    with pytest.raises(ValueError, match=f"id 'example {count}' is not among the {count} examples"):
        found.check(np.array([f"example {count}"], object), "strings", {})
    with pytest.raises(ValueError, match="id 'example 3' is there twice"):
        Examples([*given["id"], "example 3"])


def test_ids_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(places, "_NEW", 2)
    monkeypatch.setattr(places, "hash", lambda name: len(name), raising=False)
    names = [f"{n}" for n in range(30)]
    found = places.Places(names.__getitem__)
    for place, name in enumerate(names):
        assert found.find(name) is None
        found.add(name, place)
    assert list(map(found.find, names)) == [*range(30)]
    assert found.find("30") is None


@pytest.mark.parametrize(
    "kind", [range, lambda n: pa.chunked_array([[*range(4)], [*range(4, n)]]), None]
)
def test_examples_of_several_blocks_are_read_again(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(listed, "BLOCK", 3)
    monkeypatch.setattr("ghostjax.runs.loop.examples.BLOCK", 3)
    examples = kind and {"id": kind(10), "size": kind(10)}
    for first, end in ((0, 4), (2, 5)):
        with RunLog(tmp_path, examples=examples, resume=True, step=first or None) as log:
            assert log.step == first
            for step in range(first, end):
                ids = [2 * step, 2 * step + 1]
                log.add(step, ids, [1.0, 2.0], sizes=ids)
    run = read_run(tmp_path)
    assert run.examples["id"].to_pylist() == [str(n) for n in range(10)]
    assert run.examples["size"].to_pylist() == [*range(10)]
    other = {"id": range(10), "size": [*range(9), 7]}
    with pytest.raises(UsageError, match="its examples are not those that are given"):
        RunLog(tmp_path, examples=other, resume=True)
