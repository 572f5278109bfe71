"""Where a traced loss uses its parameters, and how often its frames run.

The walk follows each parameter through the jaxpr of the loss, into every inner jaxpr, to the
operations that consume it, and reads the enclosing frames from their name stacks. Operations whose
results are never used are passed over: flax traces the body of a scan twice and drops the first.
"""

import collections
import dataclasses
import math
import re
from typing import Any

from jax.extend import core

from ghostjax._errors import UnsupportedModuleError
from ghostjax._jaxprs import describe_operation, inner_jaxprs, is_var, live_equations
from ghostjax.linen._frames import MARKER, SCOPE, Trace

_FRAME = re.compile(rf"{SCOPE}(\d+)")
_DIFFERENTIATED = re.compile(rf"(jvp|transpose)\(.*{SCOPE}")
_MARKER = re.compile(rf"{MARKER}(\d+)_(\d+)")


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a parameter."""

    frames: tuple[int, ...]  # enclosing frames, outermost first
    operation: str  # its name and, where known, the user's source line


@dataclasses.dataclass
class Uses:
    """What the walk finds."""

    of_parameter: dict[str, list[Use]]
    executions: dict[int, int]  # frame -> how many times it runs in one pass
    custom_rules: set[int]  # frames inside a custom_jvp or custom_vjp function


def find_uses(trace: Trace) -> Uses:
    walk = _Walk(trace)
    aliases = dict(zip(trace.jaxpr.invars, trace.paths))
    live = [isinstance(var, core.Var) for var in trace.jaxpr.outvars]
    walk.jaxpr(trace.jaxpr, aliases, live, frames=(), repeats=1, custom=False)
    return Uses(walk.uses, dict(walk.executions), walk.custom_rules)


def enclosing_frames(eqn: Any) -> tuple[int, ...]:
    """The frames an equation was traced in, outermost first."""
    return tuple(map(int, _FRAME.findall(str(eqn.source_info.name_stack))))


def marked_frame(eqn: Any) -> int | None:
    """The frame one of whose outputs this equation marks."""
    if eqn.primitive.name != "name":
        return None
    match = _MARKER.fullmatch(eqn.params["name"])
    return int(match.group(1)) if match else None


class _Walk:
    def __init__(self, trace: Trace):
        self.trace = trace
        self.uses: dict[str, list[Use]] = {path: [] for path in trace.paths}
        self.executions: collections.Counter[int] = collections.Counter()
        self._marked: collections.Counter[tuple[int, int]] = collections.Counter()
        self.custom_rules: set[int] = set()

    def jaxpr(self, jaxpr, aliases, live_outputs, frames, repeats, custom) -> dict[Any, str]:
        """Walks one jaxpr; returns its aliases: variables that are a parameter, as it is."""
        outside, self._marked = self._marked, collections.Counter()
        equations, live = live_equations(jaxpr, live_outputs)
        for eqn in equations:
            self.equation(eqn, aliases, live, frames, repeats, custom)
        # A call marks all its outputs in one jaxpr; which of them are used may differ between runs.
        most = collections.Counter()
        for (frame, _), count in self._marked.items():
            most[frame] = max(most[frame], count)
        self.executions.update(most)
        self._marked = outside
        return aliases

    def equation(self, eqn, aliases, live, frames, repeats, custom):
        frames = frames + enclosing_frames(eqn)
        if _DIFFERENTIATED.search(str(eqn.source_info.name_stack)):
            raise UnsupportedModuleError(
                f"{self.trace.frames[frames[-1]].name} is differentiated inside loss_fn "
                f"({describe_operation(eqn)}), so that the gradient of the loss has terms of "
                "second order, which the engine does not capture."
            )
        primitive = eqn.primitive.name
        if primitive == "stop_gradient":
            return
        if primitive in ("name", "transpose"):
            # Flax transposes parameters that it scans along another axis than the first.
            if primitive == "name":
                self.mark(eqn, frames, repeats, custom)
            if is_var(eqn.invars[0]) and eqn.invars[0] in aliases:
                aliases[eqn.outvars[0]] = aliases[eqn.invars[0]]
            return
        followed = set()
        inner = inner_jaxprs(eqn)
        for jaxpr, offset in inner:
            operands = {}
            if offset is not None:
                for position, var in enumerate(eqn.invars[offset:]):
                    if is_var(var) and var in aliases:
                        operands[jaxpr.invars[position]] = aliases[var]
                        followed.add(position + offset)
            one_to_one = primitive in _CALLS and len(jaxpr.outvars) == len(eqn.outvars)
            live_outputs = (
                [var in live for var in eqn.outvars] if one_to_one else [True] * len(jaxpr.outvars)
            )
            found = self.jaxpr(
                jaxpr,
                operands,
                live_outputs,
                frames,
                repeats * (eqn.params["length"] if primitive == "scan" else 1),
                custom or primitive.startswith("custom_"),
            )
            for position, var in enumerate(jaxpr.outvars):
                if is_var(var) and var in found:
                    if one_to_one:
                        aliases[eqn.outvars[position]] = found[var]
                    else:
                        self.use(found[var], eqn, frames)
        for position, var in enumerate(eqn.invars):
            if is_var(var) and var in aliases and position not in followed:
                self.use(aliases[var], eqn, frames)

    def use(self, path, eqn, frames):
        self.uses[path].append(Use(frames, describe_operation(eqn)))

    def mark(self, eqn, frames, repeats, custom):
        match = _MARKER.fullmatch(eqn.params["name"])
        if not match:
            return
        frame, output = map(int, match.groups())
        seen = math.prod(self.trace.frames[frame].outputs[output].shape)
        mapped = math.prod(eqn.invars[0].aval.shape)
        self._marked[frame, output] += repeats * (mapped // seen if seen else 1)
        if custom:
            self.custom_rules.add(frame)


# Calls whose outputs are those of the jaxpr they hold.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call"}
