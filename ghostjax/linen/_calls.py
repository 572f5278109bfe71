"""A module call as a pure function of its parameters, and its gradients for some of the rows.

This is what makes every module exact, with or without a rule: the training gradient is the module's
own vector-Jacobian product over the training rows, in its own arithmetic.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as flax_errors
from jax.extend import core

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
    attributes: dict[str, jax.Array]  # fields of the module that are arrays
    rngs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static side of a call; ``call(operands)`` gives its inexact outputs as a list.

    ``sliceable`` calls can be made on any subset of the rows. The others (they draw random numbers,
    use the number of rows, or hold arrays with a row axis in their attributes) are always made on
    all N rows, and rows that should not count are replaced by a copy of one that does and given
    zero cotangents.
    """

    module: nn.Module  # unbound
    method: str
    unit: Unit
    num_rows: int
    variables: tuple  # treedef and, per leaf, the box's path or None
    arguments: tuple  # treedef and, per leaf, the static value or None for an array
    input_axes: tuple[int | None, ...]  # of the array leaves
    rng_counters: dict[str, int]  # how many keys the module has drawn before this call
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

        def run(module, *args, **kwargs):
            module.scope.rng_counters.update(self.rng_counters)
            return getattr(module, self.method)(*args, **kwargs)

        module = self.module.clone(**operands.attributes)
        outputs = module.apply(variables, *args, rngs=operands.rngs, method=run, **kwargs)
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
    """Takes a bound module's call apart into its static side and its operands.

    To be called before the call itself, as that may draw random keys.
    """
    unbound, variables = module.unbind()
    leaves, variables_tree = jax.tree.flatten(variables, is_leaf=is_box)
    inside = [is_box(leaf) and leaf.path in unit.paths for leaf in leaves]
    arguments, arguments_tree = jax.tree.flatten((args, kwargs))
    fields = {field.name: getattr(unbound, field.name) for field in dataclasses.fields(unbound)}
    call = Call(
        module=unbound,
        method=method,
        unit=unit,
        num_rows=num_rows,
        variables=(
            variables_tree,
            tuple(leaf.path if own else None for leaf, own in zip(leaves, inside)),
        ),
        arguments=(
            arguments_tree,
            tuple(_ARRAY if is_array(leaf) else leaf for leaf in arguments),
        ),
        input_axes=tuple(axis for axis, leaf in zip(unit.input_axes, arguments) if is_array(leaf)),
        rng_counters=dict(module.scope.rng_counters),
    )
    operands = Operands(
        params={leaf.path: leaf.array() for leaf, own in zip(leaves, inside) if own},
        others=[
            leaf.array() if is_box(leaf) else leaf for leaf, own in zip(leaves, inside) if not own
        ],
        inputs=[leaf for leaf in arguments if is_array(leaf)],
        attributes={name: value for name, value in fields.items() if is_array(value)},
        rngs=dict(module.scope.rngs),
    )
    sizes = {1, num_train, num_rows - num_train}
    # Modules with a rule are known to treat rows alike.
    sliceable = unit.rule is not None or all(_same_at(call, operands, size) for size in sizes)
    return dataclasses.replace(call, sliceable=sliceable), operands


def _same_at(call: Call, operands: Operands, size: int) -> bool:
    """Whether the call treats ``size`` rows as it treats them among all N.

    It does if it runs the same operations, up to the number of rows, and draws nothing at random.
    """

    def at(rows):
        inputs = [
            array if axis is None else jax.ShapeDtypeStruct(resized(array, axis, rows), array.dtype)
            for array, axis in zip(operands.inputs, call.input_axes)
        ]
        return jax.make_jaxpr(call)(dataclasses.replace(operands, inputs=inputs))

    def resized(array, axis, rows):
        return (*array.shape[:axis], rows, *array.shape[axis + 1 :])

    try:
        whole, part = at(call.num_rows), at(size)
    except flax_errors.ModifyScopeVariableError as error:
        raise UnsupportedModuleError(
            f"{call.unit.frame.name} owns parameters and also writes variables in the same call. "
            f"Split it into a module that owns the parameters and one that writes. ({error})"
        ) from error
    except (TypeError, ValueError, IndexError):  # it cannot be called with fewer rows
        return False
    expected = [
        resized(leaf, axis, size)
        for leaf, axis in zip(call.unit.frame.outputs, call.unit.output_axes)
    ]
    return [aval.shape for aval in part.out_avals] == expected and (
        list(_operations(whole.jaxpr)) == list(_operations(part.jaxpr))
    )


def _operations(jaxpr):
    """What a jaxpr does, apart from shapes: names, literals, and counting along an axis."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if "random" in name or "threefry" in name:
            yield object()  # equal to nothing: other rows would get other numbers
        yield name
        if name == "iota":
            yield eqn.params["shape"][eqn.params["dimension"]]
        yield from (
            np.asarray(atom.val).item() for atom in eqn.invars if isinstance(atom, core.Literal)
        )
        for inner, _ in inner_jaxprs(eqn):
            yield from _operations(inner)
