import numpy as np
import pytest

from ghostjax.runs.data.batches import VisitOrder, draw_starts, generator, make_rows

LONG = np.arange(10)
SHORT = np.frombuffer(b"xyz", np.uint8)


SIZES = [(7, 1), (7, 3), (7, 5), (7, 7), (6, 2), (9, 4), (10, 6), (23, 5)]


@pytest.mark.parametrize(("documents", "batch_size"), SIZES)
def test_visits_differ_by_at_most_one_at_any_time(documents, batch_size):
    visits = np.zeros(documents, int)
    order = VisitOrder(documents, batch_size, seed=0)
    for step in range(60):
        batch = order(step)
        assert len(set(batch.tolist())) == batch_size
        visits[batch] += 1
        assert visits.max() - visits.min() <= 1


@pytest.mark.parametrize(("documents", "batch_size"), SIZES)
def test_a_step_does_not_depend_on_which_were_asked_for_before(documents, batch_size):
    order = VisitOrder(documents, batch_size, seed=0)
    expected = [order(step).tolist() for step in range(60)]
    for step in np.random.default_rng(0).permutation(60):
        assert VisitOrder(documents, batch_size, seed=0)(step).tolist() == expected[step]
        assert order(step).tolist() == expected[step]


def test_a_late_step_draws_few_epochs(monkeypatch):
    drawn = []
    shuffled = VisitOrder._shuffled
    monkeypatch.setattr(
        VisitOrder, "_shuffled", lambda self, epoch: drawn.append(epoch) or shuffled(self, epoch)
    )
    VisitOrder(1001, 16, seed=0)(10**6)
    assert len(drawn) <= 3
    drawn.clear()
    VisitOrder(23, 16, seed=0)(10**6)
    assert len(drawn) <= 17  # fewer than two batches: an epoch depends on up to B before it


def test_a_batch_of_more_than_all_examples_is_refused():
    with pytest.raises(ValueError, match="batch_size must be from 1 to 3, got 4"):
        VisitOrder(3, 4, seed=0)


def test_epochs_are_shuffled_anew():
    order = VisitOrder(20, 20, seed=0)
    assert order(0).tolist() != order(1).tolist()
    assert order(0).tolist() != VisitOrder(20, 20, seed=1)(0).tolist()


def test_generators_of_other_uses_and_steps_differ():
    keys = [(0, "order", 1), (0, "order", 2), (1, "order", 1), (0, "windows", 1)]
    assert len({int(generator(*key).integers(2**60)) for key in keys}) == len(keys)


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
    starts = np.array([draw_starts(np.array([10, 3]), 6, rng) for _ in range(100)])
    assert set(starts[:, 0].tolist()) == {0, 1, 2, 3}
    assert set(starts[:, 1].tolist()) == {0}
