"""The memory of ``explain``: what the programs of a step need on each device, and send."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ghostjax._dots import directed
from ghostjax._late import with_factors
from ghostjax._loss import Arrays, Loss
from ghostjax._memory import Needs, needs
from ghostjax._placement import Spec, local_bytes, whole
from ghostjax._step_memory import StepMemory


def memory_of(
    opened: Callable[[Any], tuple[Arrays, Loss]], given: Sequence[Any], directions: int | None
) -> StepMemory:
    """Of a loss that ``opened`` traces.

    Args:
      given: the arrays of its arguments, or their shapes, with shardings.
    """
    sizes = mesh_of(given)
    specs = [_spec_of(leaf) for leaf in given]
    leading = () if directions is None else (directions,)
    arrays = jax.make_jaxpr(lambda leaves: opened(leaves)[0].params)(given).jaxpr
    params = needs(arrays, specs, sizes).specs
    avals = [var.aval for var in arrays.outvars]
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
    taken = {name for spec in params for names in spec for name in names}

    def added(own: Needs) -> dict[str, int]:
        return dict(collections.Counter(own.sent) - collections.Counter(found[0].sent))

    return StepMemory(
        mesh=dict(sizes),
        parameters=parameters,
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


def _spec_of(array: Any) -> Spec:
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return whole(array)
    names = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    return tuple((own,) if isinstance(own, str) else tuple(own or ()) for own in names)


def _stacked(aval: Any, leading: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A direction; on explicit axes of a mesh like the parameter, as its type says."""
    shape, sharding = (*leading, *aval.shape), None
    if AxisType.Explicit in aval.sharding.mesh.axis_types:
        spec = PartitionSpec(*[None] * len(leading), *aval.sharding.spec)
        sharding = aval.sharding.update(spec=spec)
    return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding)


def _total(arrays, specs, sizes) -> int:
    return sum(local_bytes(array, spec, sizes) for array, spec in zip(arrays, specs, strict=True))
