"""The memory of ``explain``: what the programs of a step need on each device, and send."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax._dots import directed
from ghostjax._late import with_factors
from ghostjax._loss import Arrays, Loss
from ghostjax._memory import Needs, needs
from ghostjax._placement import Spec, as_spec, local_bytes, whole
from ghostjax._step_memory import StepMemory


def memory_of(
    opened: Callable[[Any], tuple[Arrays, Loss]],
    given: Sequence[Any],
    directions: int | None,
    optimizer: optax.GradientTransformation | None,
) -> StepMemory:
    """Of a loss that ``opened`` traces.

    Args:
      given: the arrays of its arguments, or their shapes, with shardings.
      optimizer: the one whose state is on the devices, too.
    """
    sizes = mesh_of(given)
    specs = [_spec_of(leaf) for leaf in given]
    leading = () if directions is None else (directions,)

    def tree_of(leaves):
        arrays, loss = opened(leaves)
        return loss.params.unflatten(arrays.params)

    traced, shapes = jax.make_jaxpr(tree_of, return_shape=True)(given)
    params = needs(traced.jaxpr, specs, sizes).specs
    avals = [var.aval for var in traced.jaxpr.outvars]
    vectors = [_stacked(aval, leading) for aval in avals]
    moved = [((),) * len(leading) + spec for spec in params]

    def plain(leaves, vectors):
        del vectors
        arrays, loss = opened(leaves)

        def objective(params):
            return loss.outputs_of(loss.evaluate(params, arrays))

        return jax.value_and_grad(objective, has_aux=True)(arrays.params)

    def early(leaves, vectors):
        arrays, loss = opened(leaves)
        return directed(loss, arrays, loss.params.unflatten(vectors), directions, None)

    def late(leaves, vectors):
        arrays, loss = opened(leaves)
        dots = with_factors(loss, arrays, None)
        return dots.result(loss.params.unflatten(vectors))

    def program(function) -> Needs:
        jaxpr = jax.make_jaxpr(function)(given, vectors).jaxpr
        return needs(jaxpr, [*specs, *moved], sizes)

    found = [program(function) for function in (plain, early, late)]
    parameters = _total(avals, params, sizes)
    tree = jax.tree.structure(shapes).unflatten([_stacked(aval, ()) for aval in avals])
    state = [] if optimizer is None else _state_of(optimizer, tree, params)
    taken = {name for spec in params for names in spec for name in names}

    def added(own: Needs) -> dict[str, int]:
        return dict(collections.Counter(own.sent) - collections.Counter(found[0].sent))

    return StepMemory(
        mesh=dict(sizes),
        parameters=parameters,
        optimizer=sum(local_bytes(*leaf, sizes) for leaf in state),
        data=_total(given, specs, sizes) - parameters,
        direction=_total(vectors, moved, sizes),
        gradient=parameters,
        plain_scratch=found[0].scratch,
        scratch=found[1].scratch,
        late_scratch=found[2].scratch,
        sent=added(found[1]),
        late_sent=added(found[2]),
        whole=tuple(name for name, size in sizes.items() if size > 1 and name not in taken),
    )


def device_bytes() -> int | None:
    """What a device says that it has, if it does."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def mesh_of(arrays: Sequence[Any]) -> dict[str, int]:
    """The sizes of the axes of their mesh; none where no array has a ``NamedSharding``."""
    meshes = {
        tuple(leaf.sharding.mesh.shape.items())
        for leaf in arrays
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    }
    if len(meshes) > 1:
        raise ValueError(
            "arguments must be on one mesh, found meshes of axes "
            + " and ".join(str(dict(mesh)) for mesh in sorted(meshes))
            + ". Give all arrays, or their jax.ShapeDtypeStruct, shardings of the same mesh."
        )
    return dict(*meshes)


def _state_of(optimizer, params: Any, specs: Sequence[Spec]) -> list[tuple[Any, Spec]]:
    """The leaves of its state: split like the parameter whose path a leaf's path ends with, where
    their shapes agree; whole where there is none."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params))
    by_path = {jax.tree_util.keystr(path): pair for path, *pair in zip(paths, leaves, specs)}

    def spec_of(path, leaf):
        ends = (jax.tree_util.keystr(path[start:]) for start in range(len(path) + 1))
        owner, spec = next((by_path[end] for end in ends if end in by_path), (None, None))
        return spec if owner is not None and owner.shape == leaf.shape else whole(leaf)

    state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, params))
    return [(leaf, spec_of(path, leaf)) for path, leaf in state]


def _spec_of(array: Any) -> Spec:
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return whole(array)
    return as_spec(sharding.spec, array.ndim)


def _stacked(aval: Any, leading: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A direction; on explicit axes of a mesh like the parameter, as its type says."""
    shape, sharding = (*leading, *aval.shape), None
    if AxisType.Explicit in aval.sharding.mesh.axis_types:
        spec = PartitionSpec(*[None] * len(leading), *aval.sharding.spec)
        sharding = aval.sharding.update(spec=spec)
    return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding)


def _total(arrays, specs, sizes) -> int:
    return sum(local_bytes(array, spec, sizes) for array, spec in zip(arrays, specs, strict=True))
