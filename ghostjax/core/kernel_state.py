"""Whether a kernel carries anything from one row to another in memory that outlives a step."""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ghostjax._jaxprs import inner_jaxprs, is_var
from ghostjax.core.grid import NotShownError
from ghostjax.core.known import Known, read, step
from ghostjax.core.place_rules import shape_of

_READS = frozenset({"get", "masked_load", "load"})
_WRITES = frozenset({"swap", "masked_swap", "addupdate"})
_CALLS = frozenset({"jit", "pjit", "closed_call", "custom_jvp_call", "remat2"})


class Memory(enum.Enum):
    """A reference that is not of the rows of one step alone."""

    CONSTANT = "an operand without rows"
    SCRATCH = "scratch memory"
    OUTPUT = "an output that is not of the step's rows alone"


class _Kernel:
    """One step of it. ``stale`` are references that may hold what other rows have left.

    Attributes:
      programs: by axis that the kernel sees, its place in the grid and the number of places; None
        where the place is not known.
    """

    def __init__(self, programs: Sequence[tuple[int | None, int]]):
        self.programs = programs

    def run(
        self,
        jaxpr: Any,
        memory: Mapping[Any, tuple[int, Memory]],
        known: Mapping[Any, Known],
        stale: frozenset[int],
    ) -> tuple[frozenset[int], list[Known]]:
        """What is stale after it, and what is known of its outputs."""
        jaxpr, env = getattr(jaxpr, "jaxpr", jaxpr), dict(known)
        used = {atom for eqn in jaxpr.eqns for atom in eqn.invars if is_var(atom)}
        used.update(atom for atom in jaxpr.outvars if is_var(atom))
        for eqn in jaxpr.eqns:
            held = [memory.get(atom) if is_var(atom) else None for atom in eqn.invars]
            operands = [read(env, atom) for atom in eqn.invars]
            if any(inner_jaxprs(eqn)) and any(found is not None for found in held):
                stale, outputs = self._inside(eqn, held, operands, stale)
            elif any(found is not None for found in held):
                is_used = any(var in used for var in eqn.outvars)
                stale, outputs = _access(eqn, held, is_used, stale), []
            else:
                outputs = self._value(eqn, operands)
            env.update(zip(eqn.outvars, outputs))
        return stale, [read(env, atom) for atom in jaxpr.outvars]

    def _value(self, eqn, operands):
        name = eqn.primitive.name
        if name in ("program_id", "num_programs"):
            found = self.programs[eqn.params["axis"]][name == "num_programs"]
            return [None if found is None else np.asarray(found)]
        return step(eqn, operands) if _is_of_scalars(eqn) else []

    def _inside(self, eqn, held, operands, stale):
        name, jaxprs = eqn.primitive.name, inner_jaxprs(eqn)
        if name == "cond":
            branches = [jaxpr for jaxpr, _ in jaxprs]
            if operands[0] is not None:
                branches = [branches[min(max(int(operands[0]), 0), len(branches) - 1)]]
            after = [self._enter(b, held[1:], operands[1:], stale)[0] for b in branches]
            return frozenset().union(*after), []
        if name in _CALLS:
            ((jaxpr, _),) = jaxprs
            return self._enter(jaxpr, held, operands, stale)
        nothing = [None] * len(operands)
        if name == "scan":
            ((jaxpr, _),) = jaxprs
            self._enter(jaxpr, held, nothing, stale)
            return stale, []
        if name == "while":
            tested = eqn.params["cond_nconsts"]
            carry = held[tested + eqn.params["body_nconsts"] :]
            self._enter(eqn.params["cond_jaxpr"], [*held[:tested], *carry], nothing, stale)
            self._enter(eqn.params["body_jaxpr"], held[tested:], nothing, stale)
            return stale, []
        if name == "run_scoped":  # what it allocates is its own
            ((jaxpr, _),) = jaxprs
            if len(jaxpr.constvars) != len(held):
                raise NotShownError("has a kernel that is not understood")
            inside = {v: found for v, found in zip(jaxpr.constvars, held) if found is not None}
            self.run(jaxpr, inside, {}, stale)
            return stale, []
        raise NotShownError(f"uses {name} on {_names(held)}")

    def _enter(self, jaxpr, held, operands, stale):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if len(jaxpr.invars) != len(held):
            raise NotShownError("has a kernel that is not understood")
        memory = {v: found for v, found in zip(jaxpr.invars, held) if found is not None}
        known = {v: found for v, found in zip(jaxpr.invars, operands) if found is not None}
        return self.run(jaxpr, memory, known, stale)


def _access(eqn, held, is_used, stale):
    """What is stale after one operation on a reference."""
    name, found = eqn.primitive.name, held[0]
    if found is None or name not in _READS | _WRITES or any(held[1:]):
        raise NotShownError(f"uses {name} on {_names(held)}")
    number, kind = found
    reads = name in _READS or name == "addupdate" or is_used
    if reads and number in stale:
        raise NotShownError(
            f"may read from {kind.value} what other rows have left there: nothing shows that it is "
            "written first when the rows change"
        )
    if name in _WRITES and kind is Memory.CONSTANT:
        raise NotShownError(f"writes to {kind.value}")
    return stale - {number} if name == "swap" and _writes_all(eqn) else stale


def _writes_all(eqn) -> bool:
    """Whether every place is written: as many as there are, found by numbers and slices alone."""
    reference, value, *index = eqn.invars
    return (
        math.prod(shape_of(value)) == math.prod(shape_of(reference))
        and getattr(value.aval, "dtype", None) == getattr(reference.aval, "dtype", None)
        and all(shape_of(atom) == () for atom in index)
    )


def _is_of_scalars(eqn) -> bool:
    return all(getattr(var.aval, "shape", None) == () for var in (*eqn.invars, *eqn.outvars))


def _names(held) -> str:
    return ", ".join(sorted({found[1].value for found in held if found is not None}))


def check_kept_apart(
    jaxpr: Any,
    memory: Mapping[Any, Memory],
    programs: Sequence[tuple[int | None, int]],
    unclean: Sequence[Any] = (),
) -> None:
    """An error where a kernel may read what it has written for other rows.

    Args:
      memory: the references that are not of the rows of one step alone.
      programs: by axis that the kernel sees, its place where the rows have just changed, None if
        that is not known; and the size of the grid.
      unclean: those of ``memory`` that hold what other rows have left, whatever is written.

    Raises:
      NotShownError: naming what it reads or writes.
    """
    numbered = {var: (number, kind) for number, (var, kind) in enumerate(memory.items())}
    stale = frozenset(
        number
        for var, (number, kind) in numbered.items()
        if kind is not Memory.CONSTANT or var in unclean
    )
    stale, _ = _Kernel(programs).run(jaxpr, numbered, {}, stale)
    # What the first step leaves as it was, a later one must not read either.
    _Kernel([(None, size) for _, size in programs]).run(jaxpr, numbered, {}, stale)
