import errno
import os

import numpy as np
import pyarrow as pa
import pytest

from ghostjax.runs import mapped
from ghostjax.runs.data import documents
from ghostjax.runs.data.batches import VisitOrder, generator
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import run


@pytest.fixture(params=[8, 2**20], ids=["files", "memory"], autouse=True)
def small(request, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", request.param)
    return request.param


def test_arrays_begin_with_zeros_and_can_be_written():
    found = mapped.mapped((3, 50), np.float64)
    assert found.shape == (3, 50)
    assert not found.any()
    found[1] = 2
    assert found.sum() == 100
    assert mapped.mapped(0, np.int32).shape == (0,)
    np.testing.assert_array_equal(mapped.mapped_range(99), np.arange(99))


def test_growing_numbers_are_those_that_were_added():
    numbers = mapped.Growing("q")
    for n in range(20):
        numbers.append(n)
    numbers.add(np.arange(20, 30).tobytes())
    assert len(numbers) == 30
    np.testing.assert_array_equal(numbers.whole(), np.arange(30))


@pytest.mark.parametrize("parts", [[], [[]], [["", ""]], [["a", "bcd"], [], ["ü", "", "e" * 40]]])
def test_texts_are_those_of_their_parts(parts):
    sliced = [pa.array(["before", *part, "behind"]).slice(1, len(part)) for part in parts]
    found = mapped.mapped_texts(sliced)
    found.validate(full=True)
    assert found.to_pylist() == [text for part in parts for text in part]


def test_a_full_disk_is_told_before_anything_is_mapped(monkeypatch, small):
    if small > 8 or not hasattr(os, "posix_fallocate"):
        pytest.skip("needs a file")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left on device; set TMPDIR"):
        mapped.mapped(9, np.int64)


def test_the_order_of_an_epoch_is_numpys_permutation():
    order = VisitOrder(examples=40, batch_size=8, seed=3)
    epoch = np.concatenate([order(step) for step in range(5, 10)])
    np.testing.assert_array_equal(epoch, generator(3, "order", 1).permutation(40))


def test_ids_are_found_in_parts_as_in_a_dictionary(monkeypatch):
    monkeypatch.setattr(run, "ROW_GROUP", 7)
    rng = np.random.default_rng(0)
    among = [f"id{n}" for n in rng.permutation(300)]
    ids = [f"id{n}" for n in rng.integers(0, 400, 500)]
    place_of = {name: place for place, name in enumerate(among)}
    assert run.find(ids, among).tolist() == [place_of.get(name, -1) for name in ids]
    assert not run.is_twice(pa.array(among))
    for first, second in ((0, 1), (3, 299), (150, 160)):
        twice = [*among]
        twice[second] = twice[first]
        assert run.is_twice(pa.array(twice))


def test_ids_that_are_there_twice_are_found_in_parts(monkeypatch):
    monkeypatch.setattr(documents, "_ROWS", 8)
    rng = np.random.default_rng(0)
    for count in rng.integers(0, 80, 60):
        names = [str(n) for n in rng.integers(0, 400, count)]
        ids, places, expected = documents.Ids(), {}, None
        for place, name in enumerate(names):
            ids.add(name)
            if name in places and expected is None:
                expected = places[name], place
            places.setdefault(name, place)
        assert ids.twice() == expected
