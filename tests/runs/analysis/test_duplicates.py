"""Groups of near-duplicates against those of all pairs, with Python's own sets."""

import itertools
import tracemalloc

import numpy as np
import pytest

from ghostjax.runs.analysis import duplicates as module
from ghostjax.runs.analysis.duplicates import band_keys, duplicates, jaccard
from ghostjax.runs.data.elements import array_elements, text_elements

WORDS = [f"{a}{b}{c}" for a, b, c in itertools.product("bdfkl", "aeiou", "mnprs")]


def shingles(text: str) -> set[str]:
    text = " ".join(text.lower().split())
    return {text[n : n + 8] for n in range(max(1, len(text) - 7))}


def of_all_pairs(texts, similarity):
    """Connected examples, by comparing all of them."""
    sets = [shingles(text) for text in texts]
    group = list(range(len(texts)))
    for a, b in itertools.combinations(range(len(texts)), 2):
        if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= similarity:
            group = [group[a] if own == group[b] else own for own in group]
    members = [[n for n, own in enumerate(group) if own == one] for one in set(group)]
    return {tuple(own) for own in members if len(own) > 1}


@pytest.fixture(scope="module")
def texts():
    """Twenty texts with up to five variants each, which differ in some words, and copies."""
    rng, found = np.random.default_rng(0), []
    for n in range(20):
        words = rng.choice(WORDS, 60)
        for _ in range(n % 6):
            variant = words.copy()
            changed = rng.integers(60, size=rng.integers(9))
            variant[changed] = rng.choice(WORDS, len(changed))
            found.append(" ".join(variant))
        found.append(" ".join(words).upper() + "\n" * (n % 3))
    found += [found[3], "\t".join(found[8].split())]
    return [found[n] for n in rng.permutation(len(found))]


@pytest.mark.parametrize("similarity", [0.7, 0.8, 0.9, 1.0])
def test_groups_are_those_of_all_pairs(texts, similarity):
    found = duplicates(len(texts), lambda n: text_elements(texts[n].encode()), similarity)
    expected = of_all_pairs(texts, similarity)
    assert {tuple(members) for members in found} == expected
    assert len(expected) >= 2
    assert [len(members) for members in found] == sorted(map(len, found), reverse=True)
    assert all(members == sorted(members) for members in found)
    one, other = found[0][:2]
    exact = len(shingles(texts[one]) & shingles(texts[other])) / len(
        shingles(texts[one]) | shingles(texts[other])
    )
    assert jaccard(*(text_elements(texts[n].encode()) for n in (one, other))) == exact


def test_examples_without_a_likeness_have_no_group():
    assert duplicates(0, text_elements, 0.8) == []
    texts = [" ".join(np.random.default_rng(n).choice(WORDS, 30)) for n in range(50)]
    assert duplicates(len(texts), lambda n: text_elements(texts[n].encode()), 0.6) == []


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7])
def test_pairs_are_compared_as_often_as_is_told(similarity):
    rng, found, size = np.random.default_rng(1), 0, 300
    shared = round(2 * size * similarity / (1 + similarity))
    for _ in range(400):
        numbers = rng.integers(2**64, size=2 * size - shared, dtype=np.uint64)
        keys = (band_keys(numbers[:size]), band_keys(numbers[size - shared :]))
        found += bool((keys[0] == keys[1]).any())
    told = 1 - (1 - similarity**4) ** 32
    assert abs(found / 400 - told) < 4 * np.sqrt(told * (1 - told) / 400) + 1e-2


def test_a_chain_is_one_group_and_many_copies_are_compared_once(monkeypatch):
    chain = [set(range(n, n + 20)) for n in range(0, 12, 2)]  # neighbours share 18 of 22
    found = duplicates(6, lambda n: np.array(sorted(chain[n]), np.uint64), 0.8)
    assert found == [[0, 1, 2, 3, 4, 5]]
    compared = []
    monkeypatch.setattr(module, "jaccard", lambda *pair: compared.append(pair) or 1.0)
    assert duplicates(300, lambda n: np.arange(9, dtype=np.uint64), 1.0) == [[*range(300)]]
    assert len(compared) == 299


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts():
    numbers = np.arange(200_000, dtype=np.uint64)
    tracemalloc.start()
    try:
        band_keys(numbers)
        long = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        duplicates(200, lambda n: numbers[:20_000] + np.uint64(n << 40), 0.8)
        many = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert long < 12e6  # a few times the 1.6 MB of the elements, not 128 times
    assert many < 64 * 20_000 * 8 + 4e6  # of 200 times 160 kB, 64 are kept


def test_memory_of_an_example_is_that_of_its_keys(monkeypatch):
    monkeypatch.setattr(module, "band_keys", lambda elements: elements)
    count = 30_000
    tracemalloc.start()
    try:
        found = duplicates(count, lambda n: np.arange(32, dtype=np.uint64) + np.uint64(32 * n), 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == []
    assert 256 < peak / count < 256 + 100


def test_numbers_count_with_their_places():
    one = np.linspace(0, 1, 20, dtype=np.float32)
    other = one.copy()
    other[:2] = -1.0
    assert jaccard(array_elements(one), array_elements(other)) == 18 / 22
    assert jaccard(array_elements(one, np.int32(3)), array_elements(one, np.int32(4))) == 20 / 22
    assert jaccard(array_elements(one), array_elements(one[::-1])) == 0
    assert jaccard(array_elements(np.array([0.0])), array_elements(np.array([-0.0]))) == 1
