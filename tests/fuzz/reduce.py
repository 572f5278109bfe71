"""Of a program that is refused, crashes or is wrong, the shortest part that still is."""

import dataclasses
from collections.abc import Iterator, Sequence

from tests.fuzz.compare import Outcome, outcome
from tests.fuzz.programs import Program
from tests.fuzz.state import Step


def outcome_or_crash(program: Program) -> Outcome:
    """With what JAX or ghostjax raises otherwise as an outcome of its own."""
    try:
        return outcome(program)
    except Exception as error:
        return Outcome("crash", type(error).__name__, f"{type(error).__name__}: {error}")


def shorter(steps: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
    """With one step less, or a step's inner ones in its place."""
    for k, step in enumerate(steps):
        before, after = tuple(steps[:k]), tuple(steps[k + 1 :])
        yield before + after
        if step.remake is not None:
            yield before + step.inner + after
            for inner in shorter(step.inner):
                yield (*before, step.remake(inner), *after)


def reduced(program: Program) -> Program:
    """Greedily, by steps."""

    def kind_of(program: Program):
        found = outcome_or_crash(program)
        # The words of an exception up to the first digits, which are sizes or lines of code.
        words = found.message[:40] if found.kind == "crash" else ""
        return found.kind, found.reason, words

    wanted = kind_of(program)
    ends = [dataclasses.replace(program, end=end) for end in ("all",) if end != program.end]
    program = next((simple for simple in ends if kind_of(simple) == wanted), program)
    while True:
        for steps in shorter(program.steps):
            candidate = dataclasses.replace(program, steps=steps)
            if kind_of(candidate) == wanted:
                program = candidate
                break
        else:
            return program
