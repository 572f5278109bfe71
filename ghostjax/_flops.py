"""FLOPs of a jaxpr, from shapes alone.

Counted, as XLA's cost analysis does on what is unrolled:
  products (dot_general, ragged_dot_general, conv_general_dilated): two for every multiply-add; with
    padding, or with the holes of dilation, there is none
  sums and other reductions: one for every number that goes in
  moving numbers (reshape, slice, gather, iota, ...): none
  everything else: one for every number that comes out, be it a sum, a tanh or a random number
A scan counts as often as it is long, a shard_map on all of its devices; of the branches of a cond,
the largest. What nothing needs does not count. What shapes do not tell is named by
``rounds_unknown``.
"""

import math
from typing import Any

import numpy as np
from jax.extend import core

from ghostjax._jaxprs import inner_jaxprs, is_var, live_equations, scan_counts

_MOVING = """
    bitcast_convert_type broadcast broadcast_in_dim concatenate copy copy_p device_put dynamic_slice
    dynamic_update_slice empty full gather iota layout_constraint name optimization_barrier pad
    pvary random_unwrap random_wrap reshape reshard rev scatter sharding_constraint slice split
    squeeze stack stop_gradient symbolic_zeros tile transpose unstack
"""
MOVING = frozenset(_MOVING.split())
# Their work is that of one round, one place of the grid; or nothing, outside of JAX.
_UNKNOWN = "ffi_call io_callback pallas_call pure_callback while"
UNKNOWN = frozenset(_UNKNOWN.split())


def flops(jaxpr: core.Jaxpr, live_outputs: list[bool] | None = None) -> int:
    """The FLOPs that a jaxpr's outputs need, or those of them that ``live_outputs`` names."""
    live_outputs = [True] * len(jaxpr.outvars) if live_outputs is None else live_outputs
    needed, live = live_equations(jaxpr, live_outputs)
    return sum(_of_equation(eqn, [var in live for var in eqn.outvars]) for eqn in needed)


def flops_after(jaxpr: core.Jaxpr, inputs: list[core.Var]) -> int:
    """The FLOPs of what depends on some of a jaxpr's inputs, of calls and loops as a whole."""
    needed, live = live_equations(jaxpr, [True] * len(jaxpr.outvars))
    after, total = set(inputs), 0
    for eqn in needed:
        if any(is_var(atom) and atom in after for atom in eqn.invars):
            after.update(eqn.outvars)
            total += _of_equation(eqn, [var in live for var in eqn.outvars])
    return total


def equation_flops(eqn: Any) -> int:
    """The FLOPs of one equation, all its outputs being needed."""
    return _of_equation(eqn, [True] * len(eqn.outvars))


def is_product(eqn: Any) -> bool:
    """Whether an equation is a product of arrays, or a convolution."""
    return eqn.primitive.name in _PRODUCTS


def rounds_unknown(jaxpr: core.Jaxpr) -> list[Any]:
    """The equations whose work shapes do not tell: it is counted once where it may be more."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name in UNKNOWN else []
        for inner, _ in inner_jaxprs(eqn):
            found += rounds_unknown(inner)
    return found


def _of_equation(eqn, live: list[bool]) -> int:
    name = eqn.primitive.name
    if name in _PRODUCTS:
        return _PRODUCTS[name](eqn)
    if name in MOVING:
        return 0
    if name.startswith("scatter"):
        return _size(eqn.invars[2])
    if name.startswith("reduce_window"):
        return _size(eqn.outvars[0]) * math.prod(eqn.params["window_dimensions"])
    if name.startswith(("reduce", "argm")) and name != "reduce_precision":
        return _size(eqn.invars[0])
    bodies = [jaxpr for jaxpr, _ in inner_jaxprs(eqn)]
    if not bodies:
        return sum(_size(var) for var in eqn.outvars)
    if name == "cond":
        return max(flops(body, live) for body in bodies)
    if name == "scan":
        return eqn.params["length"] * flops(bodies[0], _live_in_rounds(eqn, bodies[0], live))
    if name == "shard_map":
        sizes = eqn.params["mesh"].shape
        devices = math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
        return devices * flops(bodies[0], live)
    if name == "custom_linear_solve":  # the others are its derivatives
        return flops(eqn.params["jaxprs"].solve.jaxpr)
    straight = name != "while" and len(bodies) == 1 and len(bodies[0].outvars) == len(live)
    return sum(flops(body, live if straight else None) for body in bodies)


def _live_in_rounds(eqn, body, live: list[bool]) -> list[bool]:
    """The outputs of a scan's body that are needed, if those of the scan are: the next round may
    need a carry that nothing else does."""
    consts, carries = scan_counts(eqn)
    inputs = body.invars[consts : consts + carries]
    while True:
        _, used = live_equations(body, live)
        found = [own or var in used for own, var in zip(live, inputs)] + live[carries:]
        if found == live:
            return live
        live = found


def _size(var) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _dot_general(eqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    return 2 * _size(eqn.outvars[0]) * _extent(eqn.invars[0], contracting)


def _ragged_dot_general(eqn) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    total = 2 * _size(eqn.outvars[0]) * _extent(eqn.invars[0], contracting)
    # What is contracted is divided among the groups, each of which has a product of its own.
    divided = numbers.lhs_ragged_dimensions[0] in contracting
    return total // _size(eqn.invars[2]) if divided else total


def _extent(var, axes) -> int:
    return math.prod(var.aval.shape[axis] for axis in axes)


def _convolution(eqn) -> int:
    inputs, kernel, outputs = (var.aval.shape for var in (*eqn.invars, *eqn.outvars))
    numbers = eqn.params["dimension_numbers"]
    places = zip(
        (outputs[axis] for axis in numbers.out_spec[2:]),
        (kernel[axis] for axis in numbers.rhs_spec[2:]),
        (inputs[axis] for axis in numbers.lhs_spec[2:]),
        eqn.params["window_strides"],
        (low for low, _ in eqn.params["padding"]),
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
    )
    batch, features = (outputs[axis] for axis in numbers.out_spec[:2])
    products = batch * features * kernel[numbers.rhs_spec[1]]
    return 2 * products * math.prod(_pairs(*place) for place in places)


def _pairs(outputs, window, size, stride, low, dilation, window_dilation) -> int:
    """Along one axis, how many pairs of an output and a place of the window meet an input."""
    starts, offsets = np.arange(outputs) * stride - low, np.arange(window) * window_dilation
    few, many = sorted((starts, offsets), key=len)

    def meet(place):
        inputs = many + place
        inside = (inputs >= 0) & (inputs <= (size - 1) * dilation)
        return np.count_nonzero(inside & (inputs % dilation == 0))

    return int(sum(meet(place) for place in few))


_PRODUCTS = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
}
