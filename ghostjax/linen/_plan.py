"""The plan: which module calls are taken apart, for which parameters, and how.

A *unit* is the innermost call that carries rows in all its outputs around a use of a parameter. It
is found from shapes and the jaxpr alone, before anything is computed, and every use of every
parameter must lie in exactly one unit.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._errors import UncoveredParameterError, UnsupportedModuleError
from ghostjax.linen._frames import LOST, Frame, Trace, is_array, row_axis, trace_at_two_sizes
from ghostjax.linen._leaks import find_leaks
from ghostjax.linen._rules import Rule, find_rule, refuse_mixing_rows
from ghostjax.linen._uses import Use, Uses, find_uses


@dataclasses.dataclass(frozen=True)
class Unit:
    """One call, with the row axes of its inputs and (inexact) outputs and its parameters."""

    frame: Frame
    input_axes: tuple[int | None, ...]
    output_axes: tuple[int, ...]
    paths: tuple[str, ...]
    rule: Rule | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static: everything the real pass needs to know before it starts."""

    frame_keys: tuple[tuple, ...]
    units: dict[int, Unit]
    sites: dict[str, tuple[int, ...]]  # parameter path -> frames of its units
    repeated: dict[str, bool]  # whether one of these frames runs more than once per slice


def make_plan(loss_fn: Callable, params: Any, batch: Any, args, kwargs) -> Plan:
    """Traces ``loss_fn`` and assigns every use of every parameter to a unit.

    Raises:
      UncoveredParameterError: with every parameter that no unit covers.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    trace, doubled = trace_at_two_sizes(loss_fn, params, batch, args, kwargs)
    uses = find_uses(trace)
    axes = {
        frame.index: _frame_axes(frame, twin, rows)
        for frame, twin in zip(trace.frames, doubled.frames)
    }
    complex_calls = []
    for frame in trace.frames:
        inputs, _ = axes[frame.index]
        refuse_mixing_rows(frame, inputs[0] if inputs else None)
        if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in frame.outputs):
            complex_calls.append(frame.index)
    unit_of, uncovered = _assign(trace, uses, axes)
    _absorb_or_refuse_nested(trace, unit_of, uncovered)
    uncovered |= find_leaks(trace, {index for found in unit_of.values() for index in found})
    if uncovered:
        raise UncoveredParameterError(_uncovered_message(uncovered))

    sites: dict[str, tuple[int, ...]] = {}
    for path, found in unit_of.items():
        sites[path] = tuple(sorted(set(found)))
    units = {}
    for index in sorted({index for found in sites.values() for index in found}):
        frame = trace.frames[index]
        if index in uses.custom_rules:
            raise UnsupportedModuleError(
                f"{frame.name} owns parameters and is called inside a custom_jvp or custom_vjp "
                "function, whose own rule decides its gradient. Move the call out of that function."
            )
        if index in complex_calls:
            raise UnsupportedModuleError(
                f"{frame.name} owns parameters and has complex outputs, which the engine does not "
                "take apart. Return the real and the imaginary part."
            )
        paths = tuple(path for path in trace.paths if index in sites[path])
        inputs, outputs = axes[index]
        rule = find_rule(frame, inputs[0] if inputs else None)
        units[index] = Unit(frame, inputs, outputs, paths, rule)
    repeated = {
        path: any(_runs_per_slice(uses, trace.frames[index], path) > 1 for index in found)
        for path, found in sites.items()
    }
    keys = tuple(frame.key for frame in trace.frames)
    return Plan(keys, units, sites, repeated)


def _frame_axes(frame: Frame, twin: Frame, rows: int):
    inputs = tuple(
        row_axis(leaf.shape, other.shape, rows) if is_array(leaf) else None
        for leaf, other in zip(frame.inputs, twin.inputs)
    )
    outputs = tuple(
        row_axis(leaf.shape, other.shape, rows) for leaf, other in zip(frame.outputs, twin.outputs)
    )
    return inputs, outputs


def _carries_rows(axes) -> bool:
    inputs, outputs = axes
    return (
        bool(outputs) and all(axis not in (None, LOST) for axis in outputs) and LOST not in inputs
    )


def _has_no_rows(axes) -> bool:
    """A call that returns weights, or something else that no row changes."""
    return all(axis is None for axis in axes[1])


def _runs_per_slice(uses: Uses, frame: Frame, path: str) -> int:
    slices = math.prod(length for _, length in frame.boxes[path].lifted)
    return -(-uses.executions.get(frame.index, 0) // max(slices, 1))


def _assign(trace: Trace, uses: Uses, axes):
    """For each parameter the units of its uses, and what is wrong with those that have none."""
    unit_of: dict[str, list[int]] = {path: [] for path in trace.paths}
    uncovered: dict[str, str] = {}
    for path, found in uses.of_parameter.items():
        for use in found:
            index = use.frames[-1] if use.frames else None
            while index is not None and (
                _has_no_rows(axes[index]) or not trace.frames[index].repeatable
            ):
                index = trace.frames[index].parent
            if index is not None and not _carries_rows(axes[index]):
                index = None
            if index is None:
                uncovered[path] = _reason(trace, use)
            elif path not in trace.frames[index].boxes:
                frame = trace.frames[index]
                uncovered[path] = f"used by {frame.name}, which does not own it ({use.operation})"
            else:
                unit_of[path].append(index)
    return unit_of, uncovered


def _reason(trace: Trace, use: Use) -> str:
    if not use.frames:
        return f"used outside every module call ({use.operation})"
    frame = trace.frames[use.frames[-1]]
    shapes = ", ".join(str(list(leaf.shape)) for leaf in frame.outputs) or "none"
    return (
        f"used in {frame.name}, where not every array has a row axis of its own (output shapes: "
        f"{shapes}; {use.operation})"
    )


def _absorb_or_refuse_nested(trace: Trace, unit_of, uncovered) -> None:
    """A unit inside a unit: absorbed where both are calls of one module, otherwise uncovered."""
    indices = {index for found in unit_of.values() for index in found}
    outer_of = {}
    for index in indices:
        parent = trace.frames[index].parent
        while parent is not None:
            if parent in indices:
                outer_of[index] = parent
            parent = trace.frames[parent].parent
    for found in unit_of.values():
        for position, index in enumerate(found):
            outer = outer_of.get(index)
            if outer is None:
                continue
            if trace.frames[outer].path == trace.frames[index].path:
                found[position] = outer
    remaining = {index for found in unit_of.values() for index in found}
    for path, found in unit_of.items():
        for index in found:
            if any(_is_inside(trace, other, index) for other in remaining if other != index):
                uncovered[path] = (
                    f"used in {trace.frames[index].name} itself, which also calls layers that own "
                    "parameters"
                )


def _is_inside(trace: Trace, index: int, outer: int) -> bool:
    parent = trace.frames[index].parent
    while parent is not None and parent != outer:
        parent = trace.frames[parent].parent
    return parent == outer


def _uncovered_message(uncovered: dict[str, str]) -> str:
    listing = "\n".join(f"  {path}: {reason}" for path, reason in uncovered.items())
    return (
        "the per-row gradients of these parameters cannot be captured:\n"
        f"{listing}\n"
        "Every parameter must be used in a call of a module that gets and returns arrays with a "
        "row axis of their own, and that does not call other such modules. So: give positions a "
        "row axis (nn.Embed on ids of shape [N, T], not [T]); put a bare parameter into a small "
        "module that takes the activations it is added to; apply layers to [N, T, F], not to "
        "[N * T, F]; tie an output head with Embed.attend."
    )
