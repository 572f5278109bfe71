import itertools

import numpy as np
import pytest

from ghostjax.runs.data.batches import draw_starts, make_rows, visit_order

LONG = np.arange(10)
SHORT = np.frombuffer(b"xyz", np.uint8)


@pytest.mark.parametrize(("documents", "batch_size"), [(7, 1), (7, 3), (7, 5), (7, 7), (6, 2)])
def test_visits_differ_by_at_most_one_at_any_time(documents, batch_size):
    visits = np.zeros(documents, int)
    order = visit_order(documents, batch_size, np.random.default_rng(0))
    for batch in itertools.islice(order, 40):
        assert len(set(batch.tolist())) == batch_size
        visits[batch] += 1
        assert visits.max() - visits.min() <= 1


def test_epochs_are_shuffled_anew():
    order = visit_order(20, 20, np.random.default_rng(0))
    assert next(order).tolist() != next(order).tolist()


def test_rows_are_windows_with_the_tokens_that_follow():
    rows = make_rows([LONG, SHORT], [4, 0], 4)
    assert rows["inputs"].tolist() == [[4, 5, 6, 7], [*b"xy", 0, 0]]
    assert rows["targets"].tolist() == [[5, 6, 7, 8], [*b"yz", 0, 0]]
    assert rows["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert {name: str(value.dtype) for name, value in rows.items()} == {
        "inputs": "int32",
        "targets": "int32",
        "mask": "float32",
    }


def test_a_document_of_exactly_one_window_is_seen_whole():
    rows = make_rows([np.frombuffer(b"abcde", np.uint8)], [0], 4)
    assert bytes(rows["inputs"][0].tolist()) == b"abcd"
    assert rows["mask"].all()


def test_windows_start_anywhere_they_fit():
    rng = np.random.default_rng(0)
    starts = np.array([draw_starts([LONG, SHORT], 6, rng) for _ in range(100)])
    assert set(starts[:, 0].tolist()) == {0, 1, 2, 3}
    assert set(starts[:, 1].tolist()) == {0}
