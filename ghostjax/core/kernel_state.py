"""Whether a kernel carries anything from one row to another in memory that outlives a step."""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ghostjax._jaxprs import CALLS, inner_jaxprs, scan_counts, value_in
from ghostjax.core.grid import NotShownError
from ghostjax.core.known import read, step
from ghostjax.core.place_rules import shape_of

_READS = frozenset({"get", "masked_load", "load"})
_WRITES = frozenset({"swap", "masked_swap", "addupdate"})
_CALLS = CALLS | {"custom_jvp_call", "remat2"}


class Memory(enum.Enum):
    """What a reference of a kernel is to the rows of one step."""

    OWN = "a block of the step's rows"
    CONSTANT = "an operand without rows"
    SCRATCH = "scratch memory"
    OUTPUT = "an output that other rows write as well"


class _Kernel:
    """Steps of it.

    Attributes:
      programs: by axis that the kernel sees, its place in the grid and the number of places; None
        where the place is not known.
      kinds: by reference.
      reached: references that something of other rows may have been written to, and why. What they
        held when the rows changed does not count.
    """

    def __init__(self, kinds: Mapping[Any, Memory], reached: dict[Any, str]):
        self.programs: Sequence[tuple[int | None, int]] = ()
        self.kinds = kinds
        self.reached = reached

    def run(self, jaxpr, references, known, foreign, stale, why=None):
        """What happens in a jaxpr.

        Args:
          references: by variable, the reference that it is.
          known: by variable, its value.
          foreign: by variable, why it may depend on other rows.
          stale: references that may hold what other rows have left.
          why: why other rows may say whether this is run at all.

        Returns:
          ``stale`` afterwards, and of the outputs what is known and why they may be foreign.
        """
        env, foreign = dict(known), dict(foreign)
        for eqn in jaxpr.eqns:
            held = [value_in(references, atom) for atom in eqn.invars]
            values = [read(env, atom) for atom in eqn.invars]
            reasons = [value_in(foreign, atom) for atom in eqn.invars]
            if inner_jaxprs(eqn) and any(found is not None for found in held):
                stale, outputs, found = self._inside(eqn, held, values, reasons, stale, why)
            elif any(found is not None for found in held):
                stale, found = self._access(eqn, held, reasons, stale, why)
                outputs, found = [], [found] * len(eqn.outvars)
            else:
                outputs, found = self._value(eqn, values), [_first(reasons)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outputs))
            foreign.update((var, reason) for var, reason in zip(eqn.outvars, found) if reason)
        outputs = [read(env, atom) for atom in jaxpr.outvars]
        return stale, outputs, [value_in(foreign, atom) for atom in jaxpr.outvars]

    def _value(self, eqn, values):
        name = eqn.primitive.name
        if name in ("program_id", "num_programs"):
            found = self.programs[eqn.params["axis"]][name == "num_programs"]
            return [None if found is None else np.asarray(found)]
        scalars = all(getattr(var.aval, "shape", None) == () for var in (*eqn.invars, *eqn.outvars))
        return step(eqn, values) if scalars else []

    def _access(self, eqn, held, reasons, stale, why):
        """What is stale after one operation on references, and why its outputs may be foreign."""
        name, reference = eqn.primitive.name, held[0]
        kinds = {self.kinds.get(found, Memory.OWN) for found in held if found is not None}
        is_simple = name in _READS | _WRITES and held.count(None) == len(held) - 1
        if kinds != {Memory.OWN} and not (is_simple and reference is not None):
            names = ", ".join(sorted(kind.value for kind in kinds - {Memory.OWN}))
            raise NotShownError(f"uses {name} on {names}")
        if name in _WRITES and Memory.CONSTANT in kinds:
            raise NotShownError(f"writes to {Memory.CONSTANT.value}")
        seen = _first([*reasons, why, *(self._content(r, stale) for r in held if r is not None)])
        given = _first([*reasons, why])
        if given and name not in _READS:
            for found in held:
                if found is not None:
                    self.reached.setdefault(found, given)
        is_written = name == "swap" and is_simple and _writes_all(eqn)
        return (stale - {reference} if is_written else stale), seen

    def _content(self, reference, stale) -> str | None:
        if reference in stale:
            kind = self.kinds[reference].value
            return (
                f"may read from {kind} what other rows have left there: nothing shows that it is "
                "written first when the rows change"
            )
        return self.reached.get(reference)

    def _inside(self, eqn, held, values, reasons, stale, why):
        name, jaxprs = eqn.primitive.name, inner_jaxprs(eqn)
        nothing = [None] * len(values)
        if name == "cond":
            branches = [jaxpr for jaxpr, _ in jaxprs]
            if values[0] is not None:
                branches = [branches[min(max(int(values[0]), 0), len(branches) - 1)]]
            says = _first([why, reasons[0]])
            rest = held[1:], values[1:], reasons[1:]
            after = [self._enter(branch, *rest, stale, says) for branch in branches]
            found = [_first([says, *each]) for each in zip(*(found for _, _, found in after))]
            return frozenset().union(*(left for left, _, _ in after)), [], found
        if name in _CALLS:
            ((jaxpr, _),) = jaxprs
            return self._enter(jaxpr, held, values, reasons, stale, why)
        if name == "scan":
            ((jaxpr, _),) = jaxprs
            start, count = scan_counts(eqn)
            while True:
                _, _, found = self._enter(jaxpr, held, nothing, reasons, stale, why)
                joined = [_first(pair) for pair in zip(reasons[start:], found[:count])]
                if joined == reasons[start : start + count]:
                    return stale, [], found
                reasons = [*reasons[:start], *joined, *reasons[start + count :]]
        if name == "while":
            return self._while(eqn, held, nothing, reasons, stale, why)
        if name == "run_scoped":  # what it allocates is its own
            ((jaxpr, _),) = jaxprs
            if len(jaxpr.constvars) != len(held):
                raise NotShownError("has a kernel that is not understood")
            inside = dict(zip(jaxpr.invars, jaxpr.invars))
            inside.update((v, r) for v, r in zip(jaxpr.constvars, held) if r is not None)
            foreign = {v: found for v, found in zip(jaxpr.constvars, reasons) if found}
            _, _, found = self.run(jaxpr, inside, {}, foreign, stale, why)
            return stale, [], found
        raise NotShownError(f"uses {name} on references")

    def _while(self, eqn, held, nothing, reasons, stale, why):
        tested = eqn.params["cond_nconsts"]
        start = tested + eqn.params["body_nconsts"]
        while True:
            sides = [*zip(held[:tested] + held[start:], reasons[:tested] + reasons[start:])]
            test = [list(side) for side in zip(*sides)] or [[], []]
            says = self._enter(
                eqn.params["cond_jaxpr"], test[0], nothing[: len(sides)], test[1], stale, why
            )[2][0]
            says = _first([why, says])
            rest = held[tested:], nothing[tested:], reasons[tested:]
            _, _, found = self._enter(eqn.params["body_jaxpr"], *rest, stale, says)
            joined = [_first([*pair, says]) for pair in zip(reasons[start:], found)]
            if joined == reasons[start:]:
                return stale, [], joined
            reasons = [*reasons[:start], *joined]

    def _enter(self, jaxpr, held, values, reasons, stale, why):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if len(jaxpr.invars) != len(held):
            raise NotShownError("has a kernel that is not understood")
        given = [dict(zip(jaxpr.invars, side)) for side in (held, values, reasons)]
        given = [{v: x for v, x in side.items() if x is not None} for side in given]
        return self.run(jaxpr, *given, stale, why)


def _first(reasons) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _writes_all(eqn) -> bool:
    """Whether every place is written: as many as there are, found by numbers and slices alone."""
    reference, value, *index = eqn.invars
    return (
        math.prod(shape_of(value)) == math.prod(shape_of(reference))
        and getattr(value.aval, "dtype", None) == getattr(reference.aval, "dtype", None)
        and all(shape_of(atom) == () for atom in index)
    )


def reached_by_others(
    jaxpr: Any,
    kinds: Mapping[Any, Memory],
    programs: Sequence[tuple[int | None, int]],
    unclean: Sequence[Any] = (),
) -> dict[Any, str]:
    """The references of a kernel to which something of other rows may be written, and why.

    Args:
      kinds: by reference, those that are not ``OWN``.
      programs: by axis that the kernel sees, its place where the rows have just changed, None if
        that is not known; and the size of the grid.
      unclean: those that hold what other rows have left, whatever is written.

    Raises:
      NotShownError: what the kernel does to its references cannot be followed.
    """
    stale = {var for var, kind in kinds.items() if kind in (Memory.SCRATCH, Memory.OUTPUT)}
    reached = dict.fromkeys(unclean, "shares memory between an output and an operand without rows")
    references = {var: var for var in jaxpr.invars}
    while True:
        before = dict(reached)
        kernel = _Kernel(kinds, reached)
        kernel.programs = programs
        left, _, _ = kernel.run(jaxpr, references, {}, {}, frozenset(stale))
        # What the first step leaves as it was, a later one may read.
        kernel.programs = [(None, size) for _, size in programs]
        kernel.run(jaxpr, references, {}, {}, left)
        if reached == before:
            return reached
