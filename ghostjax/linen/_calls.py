"""A module call as a pure function of its parameters, and its gradients for some of the rows.

This is what makes every module exact, with or without a rule: the training gradient is the module's
own vector-Jacobian product over the training rows, in its own arithmetic.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors as flax_errors

from ghostjax._errors import UnsupportedModuleError
from ghostjax._jaxprs import inner_jaxprs
from ghostjax.linen._boxes import is_box
from ghostjax.linen._frames import is_array
from ghostjax.linen._plan import Unit
from ghostjax.linen._records import RowGradients, accumulation_dtype, contract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Everything traced that a call depends on."""

    params: dict[str, jax.Array]  # those of the unit, by path
    others: list[jax.Array]  # variables that are not among them
    inputs: list[jax.Array]  # array leaves of (args, kwargs)
    rngs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static side of a call; ``call(operands)`` gives its inexact outputs as a list.

    ``sliceable`` calls can be made on any subset of the rows. The others (they draw random numbers,
    or hold arrays with a row axis in their attributes) are always made on all N rows, and rows that
    should not count are replaced by a copy of one that does and given zero cotangents.
    """

    module: nn.Module  # unbound
    method: str
    unit: Unit
    num_rows: int
    variables: tuple  # treedef and, per leaf, the box's path or None
    arguments: tuple  # treedef and, per leaf, the static value or None for an array
    input_axes: tuple[int | None, ...]  # of the array leaves
    sliceable: bool = True

    def __call__(self, operands: Operands) -> list[jax.Array]:
        treedef, paths = self.variables
        others = iter(operands.others)
        leaves = [
            operands.params[path] if path in operands.params else next(others) for path in paths
        ]
        variables = jax.tree.unflatten(treedef, leaves)
        treedef, static = self.arguments
        inputs = iter(operands.inputs)
        args, kwargs = jax.tree.unflatten(
            treedef, [next(inputs) if leaf is _ARRAY else leaf for leaf in static]
        )
        outputs = self.module.apply(
            variables, *args, rngs=operands.rngs, method=self.method, **kwargs
        )
        return split_outputs(outputs)[0]

    def restrict(self, operands, cotangents, start, size):
        """The call and its cotangents with only ``size`` rows from ``start`` on counting."""
        stop = start + size
        if self.sliceable:

            def part(array, axis):
                return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
        else:

            def part(array, axis):
                index = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
                kept = jax.lax.dynamic_slice_in_dim(array, start, 1, axis)
                return jnp.where((index >= start) & (index < stop), array, kept)

        inputs = [
            array if axis is None else part(array, axis)
            for array, axis in zip(operands.inputs, self.input_axes)
        ]
        cotangents = [part(array, axis) for array, axis in zip(cotangents, self.unit.output_axes)]
        if not self.sliceable:
            for position, axis in enumerate(self.unit.output_axes):
                array = cotangents[position]
                index = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
                counts = (index >= start) & (index < stop)
                cotangents[position] = jnp.where(counts, array, jnp.zeros_like(array))
        return dataclasses.replace(operands, inputs=inputs), cotangents

    def total(self, operands, cotangents, start, size) -> dict[str, jax.Array]:
        """The gradient summed over ``size`` rows from ``start``, per parameter."""
        operands, cotangents = self.restrict(operands, cotangents, start, size)

        def run(params):
            return self(dataclasses.replace(operands, params=params))

        return jax.vjp(run, operands.params)[1](cotangents)[0]

    def per_row(self, operands, cotangents) -> dict[str, jax.Array]:
        """The gradient of every row, [N, *p] each, accumulated in float32 or wider."""

        def one(row):
            return self.total(operands, cotangents, row, 1)

        rows = jnp.arange(self.num_rows)
        gradients = jax.vmap(one)(rows) if self.sliceable else jax.lax.map(one, rows)
        return jax.tree.map(lambda rows: rows.astype(accumulation_dtype(rows)), gradients)

    def contract(self, operands, cotangents, num_train) -> dict[str, jax.Array]:
        """Dots [B] of each training row with the sum over validation rows, per parameter.

        With the validation total known, they are the cotangents times the tangents that the total
        causes at the output, so no per-row gradient is formed.
        """
        if self._has_custom_vjp(operands):  # no forward mode through such a function
            gradients = self.per_row(operands, cotangents)
            return {
                path: contract([RowGradients(rows)], num_train) for path, rows in gradients.items()
            }
        direction = self.total(operands, cotangents, num_train, self.num_rows - num_train)
        operands, cotangents = self.restrict(operands, cotangents, 0, num_train)
        dots = {}
        for path, tangent in direction.items():
            # Tangents of parameters that a rule has dealt with are dead code, dropped by XLA.

            def run(value, path=path):
                params = {**operands.params, path: value}
                return self(dataclasses.replace(operands, params=params))

            tangents = jax.jvp(run, (operands.params[path],), (tangent,))[1]
            dots[path] = sum(
                _row_dots(cotangent, tangent, axis)[:num_train]
                for cotangent, tangent, axis in zip(cotangents, tangents, self.unit.output_axes)
            )
        return dots

    def _has_custom_vjp(self, operands) -> bool:
        def search(jaxpr):
            return any(
                eqn.primitive.name.startswith("custom_vjp")
                or any(search(inner) for inner, _ in inner_jaxprs(eqn))
                for eqn in jaxpr.eqns
            )

        return search(jax.make_jaxpr(self)(operands).jaxpr)


_ARRAY = object()


def split_outputs(outputs: Any):
    """The inexact leaves of ``outputs``, and the function that puts new ones in their place."""
    leaves, treedef = jax.tree.flatten(outputs)
    positions = [
        position
        for position, leaf in enumerate(leaves)
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]

    def rebuild(inexact):
        new = list(leaves)
        for position, leaf in zip(positions, inexact):
            new[position] = leaf
        return jax.tree.unflatten(treedef, new)

    return [leaves[position] for position in positions], rebuild


def _row_dots(cotangents, tangents, axis):
    others = [position for position in range(cotangents.ndim) if position != axis]
    dtype = accumulation_dtype(cotangents)
    return jnp.sum(cotangents.astype(dtype) * tangents.astype(dtype), axis=others)


def make_call(module, method, unit: Unit, num_rows, num_train, args, kwargs):
    """Takes a bound module's call apart into its static side and its operands."""
    unbound, variables = module.unbind()
    leaves, variables_tree = jax.tree.flatten(variables, is_leaf=is_box)
    paths = tuple(
        leaf.path if is_box(leaf) and leaf.path in unit.paths else None for leaf in leaves
    )
    params = {
        leaf.path: leaf.array() for leaf in leaves if is_box(leaf) and leaf.path in unit.paths
    }
    others = [
        leaf.array() if is_box(leaf) else leaf for leaf, path in zip(leaves, paths) if path is None
    ]
    arguments, arguments_tree = jax.tree.flatten((args, kwargs))
    static = tuple(_ARRAY if is_array(leaf) else leaf for leaf in arguments)
    inputs = [leaf for leaf in arguments if is_array(leaf)]
    call = Call(
        module=unbound,
        method=method,
        unit=unit,
        num_rows=num_rows,
        variables=(variables_tree, paths),
        arguments=(arguments_tree, static),
        input_axes=tuple(axis for axis, leaf in zip(unit.input_axes, arguments) if is_array(leaf)),
    )
    operands = Operands(params, others, inputs, {})
    if call_is_sliceable(call, operands, num_train):
        return call, operands
    operands = dataclasses.replace(operands, rngs=dict(module.scope.rngs))
    return dataclasses.replace(call, sliceable=False), operands


def call_is_sliceable(call: Call, operands: Operands, num_train: int) -> bool:
    """Whether the call gives its rows alike when it is made on the training rows alone."""
    rows = num_train

    def run(operands):
        cotangents = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in call.unit.frame.outputs]
        return call(call.restrict(operands, cotangents, 0, rows)[0])

    try:
        outputs = jax.eval_shape(run, operands)
    except flax_errors.ModifyScopeVariableError as error:
        raise UnsupportedModuleError(
            f"{call.unit.frame.name} owns parameters and also writes variables in the same call. "
            f"Split it into a module that owns the parameters and one that writes. ({error})"
        ) from error
    except Exception:  # whatever fails on fewer rows is run on all of them
        return False
    expected = [list(leaf.shape) for leaf in call.unit.frame.outputs]
    for shape, axis in zip(expected, call.unit.output_axes):
        shape[axis] = rows
    return [list(leaf.shape) for leaf in outputs] == expected
