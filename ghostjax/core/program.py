"""A jaxpr as a list of steps, with the calls in it opened, so that it can be run in parts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from ghostjax._jaxprs import bind, is_var
from ghostjax.core.places import BODIES
from ghostjax.core.promises import is_promise

Atom = Any  # the number of a value, or a literal


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation, on numbered values: one jaxpr may be called twice."""

    eqn: Any
    inputs: list[Atom]
    outputs: list[int]


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in order, none without a use; values of constants by number."""

    steps: list[Step]
    inputs: list[int]
    outputs: list[Atom]
    consts: dict[int, Any]

    @functools.cached_property
    def used(self) -> set[int]:
        """The numbers of what steps or outputs use."""
        atoms = itertools.chain(self.outputs, *(step.inputs for step in self.steps))
        return {atom for atom in atoms if not is_literal(atom)}


def is_literal(atom: Atom) -> bool:
    return not isinstance(atom, int)


def program_of(closed: core.ClosedJaxpr, wanted: Sequence[bool]) -> Program:
    """What the ``wanted`` outputs need. Derivative rules of functions that are called are gone."""
    numbers, steps, consts = itertools.count(), [], {}

    def constant(value):
        number = next(numbers)
        consts[number] = value
        return number

    def open_(jaxpr, atoms):
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], atoms, strict=True))

        def read(atom):
            return env[atom] if is_var(atom) else atom

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in BODIES and not is_promise(eqn):
                inner = eqn.params[BODIES[eqn.primitive.name]]
                if isinstance(inner, core.ClosedJaxpr):
                    outputs = open_(inner.jaxpr, [*map(constant, inner.consts), *inputs])
                else:
                    outputs = open_(inner, inputs)
            else:
                outputs = [next(numbers) for _ in eqn.outvars]
                steps.append(Step(eqn, inputs, outputs))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = [next(numbers) for _ in closed.jaxpr.invars]
    outputs = open_(closed.jaxpr, [*map(constant, closed.consts), *inputs])
    outputs = [atom for atom, is_wanted in zip(outputs, wanted, strict=True) if is_wanted]
    live, needed = {atom for atom in outputs if not is_literal(atom)}, []
    for step in reversed(steps):
        if step.eqn.effects or not live.isdisjoint(step.outputs):
            needed.append(step)
            live.update(atom for atom in step.inputs if not is_literal(atom))
    consts = {number: value for number, value in consts.items() if number in live}
    return Program(needed[::-1], inputs, outputs, consts)


def run(
    steps: Sequence[Step], env: dict[int, Any], evaluate: Callable[..., list] = bind
) -> Callable[[Atom], Any]:
    """Fills ``env`` and returns how to read it."""

    def read(atom):
        return atom.val if is_literal(atom) else env[atom]

    for step in steps:
        outputs = evaluate(step.eqn, [read(atom) for atom in step.inputs])
        env.update(zip(step.outputs, outputs, strict=True))
    return read
