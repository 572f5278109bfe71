"""Random programs against per-row autodiff. ``python -m tests.fuzz SEED`` shows one of them."""

import jax
import pytest

from tests.fuzz.compare import outcome
from tests.fuzz.norms import norms_outcome
from tests.fuzz.programs import program
from tests.fuzz.refused import AMBIGUOUS, MOST, REFUSED

COUNT, AT_ONCE = 500, 10


def firsts(quick, slow, count):
    """Of every ten programs the first: those below ``quick`` are quick, others slow or weekly."""
    marks = {0: [], 1: [pytest.mark.slow], 2: [pytest.mark.slow, pytest.mark.weekly]}
    return [
        pytest.param(first, marks=marks[(first >= quick) + (first >= slow)])
        for first in range(0, count, AT_ONCE)
    ]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("first", firsts(AT_ONCE, 200, COUNT))
def test_programs(first):
    """Dots are exact, or refused where they were before; of rows that are mixed they may be NaN."""
    wrong, known = [], {seed for own in REFUSED.values() for seed in own}
    for seed in range(first, first + AT_ONCE):
        found = outcome(program(seed))
        is_mixed = program(seed).family == "mixed"
        if seed in AMBIGUOUS or (is_mixed and found.kind in ("exact", "refused", "NaN")):
            continue
        # What is no longer refused goes from the list.
        if found.kind != ("refused" if seed in known else "exact"):
            wrong.append(f"{program(seed).text()}\n{found.kind} {found.reason}: {found.message}")
    # Each executable is used once, and they would fill the memory.
    jax.clear_caches()
    assert not wrong, "\n\n".join(wrong)


# Of saturated activations, whose derivative is a difference that XLA rounds in several ways.
SATURATED = {31}


@pytest.mark.parametrize("first", firsts(0, 30, 100))
def test_norms_and_clipped_gradients(first):
    """Exact, or refused as dots are."""
    wrong, known = [], {seed for own in REFUSED.values() for seed in own}
    for seed in range(first, first + AT_ONCE):
        if program(seed).family == "mixed" or seed in SATURATED | AMBIGUOUS:
            continue
        found = norms_outcome(program(seed))
        if found.kind == "wrong" or (found.kind == "refused" and seed not in known):
            wrong.append(f"{program(seed).text()}\n{found.kind} {found.reason}: {found.message}")
    jax.clear_caches()
    assert not wrong, "\n\n".join(wrong)


def test_that_refusals_are_few():
    """Of 400 programs that keep rows apart; these counts can only shrink."""
    counts = {reason: len(seeds) for reason, seeds in REFUSED.items()}
    assert all(count <= MOST.get(reason, 0) for reason, count in counts.items())
    seeds = [seed for own in REFUSED.values() for seed in own]
    assert len(seeds) == len(set(seeds))
    assert all(0 <= seed < COUNT and program(seed).family != "mixed" for seed in seeds)
