"""``shard_map`` in which parameters and data meet: the walk goes inside and builds it again.

What the walk carries enters beside the operands, split over the mesh as the rows are. So it is the
transpose of ``shard_map`` itself that adds up what a row's dots get on several devices.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ghostjax._jaxprs import describe_operation
from ghostjax.core.devices import (
    enter,
    enter_positions,
    leave,
    leave_positions,
    split_axes,
)
from ghostjax.core.examples import Regrouped
from ghostjax.core.exchange import SentRows, brought_back, sent_out, sent_over
from ghostjax.core.harvest import summed, sums_of_left
from ghostjax.core.place_rules import Mixed, shape_of
from ghostjax.core.tracking import HANDLERS
from ghostjax.core.tracks import Known, Moved, Track, Where
from ghostjax.core.types import varying
from ghostjax.core.values import Value
from ghostjax.core.walk import Walk


def _shard_map(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    params = eqn.params
    if walk.no_shard_map is not None:
        raise NotImplementedError(
            f"{walk.describe(eqn)}: parameters ({walk.named(operands)}) and data meet inside of "
            f"shard_map, where {walk.no_shard_map}"
        )
    places = [_in_place(value.rows, "before") for value in operands]
    if not walk.follows:
        walk.places_after(eqn, operands)
    infos, local = enter(eqn, places, walk.num_rows)
    split = split_axes(local)[len(split_axes(walk.num_rows)) :]
    key, devices, classes = walk.next_key(), _Devices(eqn), []
    sent = ()
    if walk.follows and split == split_axes(local):
        sent = sent_over(params["jaxpr"], infos, local, tuple(devices.names))
    is_sent = bool(sent)

    entered = [
        enter_positions(eqn, value.where.positions, spec, walk.labels)
        for value, spec in zip(operands, params["in_specs"], strict=True)
    ]

    def body(primals, tangents, of_rows, others, labels, slots):
        inner = walk.inside(key, jax.tree.map(devices.own, slots))
        inner.labels = labels
        # A device that sends rows to others sees those of all.
        inner.num_rows = SentRows(walk.num_rows, sent) if is_sent else local
        for names, arrays in ((walk.arrays_of_rows, of_rows), (walk.other_arrays, others)):
            for name, array in zip(names, arrays):
                setattr(inner, name, array)
        values = [
            dataclasses.replace(
                value,
                primal=primal,
                tangents=own,
                where=Where(
                    sent_out(info, shape_of(var), local) if is_sent else Track(info), where
                ),
                direct=False,
                axes=None,
            )
            for value, primal, own, info, where, var in zip(
                operands, primals, tangents, infos, entered, params["jaxpr"].invars
            )
        ]
        outputs = inner.open(params["jaxpr"], [], values)
        if is_sent:
            found = [
                brought_back(inner, eqn, value.where.rows, spec, shape_of(var), local)
                for value, spec, var in zip(
                    outputs, params["out_specs"], params["jaxpr"].outvars, strict=True
                )
            ]
        else:
            found = [_in_place(value.rows, "inside of") for value in outputs]
        classes[:] = [
            dataclasses.replace(
                value,
                primal=None,
                tangents={},
                support=None,
                where=Where(Track(place), leave_positions(eqn, value.where.positions, spec)),
            )
            for value, spec, place in zip(outputs, params["out_specs"], found, strict=True)
        ]
        results = [value.primal for value in outputs], [value.tangents for value in outputs]
        return *results, inner.results()

    before = (None,) if walk.stacked else ()
    of_rows = PartitionSpec()
    if local is not None and walk.labels is None and not is_sent:
        of_rows = PartitionSpec(*before, split or None)

    def with_tangents(specs):
        return list(specs), [PartitionSpec(*before, *spec) for spec in specs]

    slots = walk.slots_of(key)
    with eqn.ctx.manager:
        primals, tangents, found = devices.run(
            body,
            [_array(value, var) for value, var in zip(operands, eqn.invars)],
            [value.tangents for value in operands],
            [getattr(walk, name) for name in walk.arrays_of_rows],
            [getattr(walk, name) for name in walk.other_arrays],
            walk.labels,
            slots,
            in_specs=(
                *with_tangents(params["in_specs"]),
                of_rows,
                PartitionSpec(),
                PartitionSpec() if is_sent else PartitionSpec(split or None),
                jax.tree.map(devices.spec_of, slots),
            ),
            out_specs=with_tangents(params["out_specs"]),
        )
    for name, meeting in getattr(walk, "meetings", {}).items():
        if name.startswith(f"{key}."):
            cotangents = (slots or found[1])[name]
            walk.meetings[name] = OnDevices(meeting, devices, split, cotangents)
    walk.receive(found)
    places = leave(eqn, [value.rows for value in classes], walk.num_rows, local)
    return [
        dataclasses.replace(
            value, primal=primal, tangents=own, where=Where(Track(info), value.where.positions)
        )
        for value, primal, own, info in zip(classes, primals, tangents, places)
    ]


def _in_place(place: Any, when: str) -> Any:
    """The numbers of rows do not cross the border: every device has its own."""
    if isinstance(place, (Known, Moved)):
        return Mixed(
            f"rows are moved {when} shard_map and not brought back there; where shard_maps are "
            "nested, one over all of their axes keeps rows apart"
        )
    return place


class _Devices:
    """The devices of a ``shard_map``, and arrays of which each has its own.

    Outside, these have a leading axis for every manual axis of the mesh, in the order of the mesh,
    of size one where all devices along it have the same.
    """

    def __init__(self, eqn: Any):
        self.eqn, self.params = eqn, eqn.params
        manual = eqn.params["newly_manual_axes"]
        self.names = [name for name in eqn.params["mesh"].axis_names if name in manual]

    def spec_of(self, array: Any) -> PartitionSpec:
        sizes = jnp.shape(array)[: len(self.names)]
        return self._spec(name for name, size in zip(self.names, sizes) if size > 1)

    def own(self, array: jax.Array) -> jax.Array:
        return jnp.squeeze(array, range(len(self.names)))

    def mapped(self, function, in_specs, out_specs, check_vma: bool):
        return jax.shard_map(
            function,
            mesh=self.params["mesh"],
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=self.params["newly_manual_axes"],
            check_vma=check_vma,
        )

    def run(self, body, *args, in_specs, out_specs):
        """``body`` on every device; of its last result every device has its own."""
        types: list[Any] = []

        def separated(*args):
            *results, own = body(*args)
            types.append(jax.tree.map(jax.typeof, own))
            leading = range(len(self.names))
            return *results, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, leading), own)

        def mapped(apart):
            check_vma = self.params["check_vma"]
            return self.mapped(separated, in_specs, (*out_specs, apart), check_vma)(*args)

        every = self._spec(self.names)
        if not self.params["check_vma"]:
            return mapped(every)
        # Over which axes they vary is known when the body has been traced.
        jax.eval_shape(lambda: mapped(every))
        return mapped(jax.tree.map(lambda kind: self._spec(varying(kind)), types.pop()))

    def _spec(self, names) -> PartitionSpec:
        names = set(names)
        return PartitionSpec(*(name if name in names else None for name in self.names))


class OnDevices:
    """A meeting inside ``shard_map``, for the time after the walk: what it gives on all devices.

    Args:
      meeting: what it is on one device.
      split: the axes of the mesh that its rows are split over.
      cotangents: arrays as they are outside.
    """

    keeps_row_gradients = in_branch = False  # seen to on every device

    def __init__(self, meeting: Any, devices: _Devices, split: tuple[str, ...], cotangents):
        is_moved = isinstance(meeting, Regrouped)
        if is_moved or getattr(meeting, "adds_up_over_devices", False):
            what = "rows are moved" if is_moved else "a backward rule adds up over devices"
            raise NotImplementedError(
                f"{what} inside of {describe_operation(devices.eqn)}, where factors for late "
                "directions are not kept. Pass remat=True to value_and_dots_fn, or take "
                "value_grad_and_dots."
            )
        self._meeting, self._devices, self._split = meeting, devices, split
        self.eqn, self.names, self.moving = meeting.eqn, meeting.names, meeting.moving
        self.rows, self.in_rows, self.route = meeting.rows, meeting.in_rows, meeting.route
        self.parted, self.has_rest = meeting.parted, meeting.has_rest
        self.differentiable, self.outputs = meeting.differentiable, list(meeting.outputs)
        for k, cotangent in zip(meeting.differentiable, cotangents):
            self.outputs[k] = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype)

    def context(self) -> Any:
        return self._devices.eqn.ctx.manager

    def takes_gradient(self, route: Any) -> None:
        del route

    def sums(self, kept, vectors, cotangents, stacked: bool, route: Any) -> dict[int, Any]:
        """What the meeting gives on every device, added up where they have the same rows."""
        devices = self._devices
        split = self._split if all(self.in_rows.values()) else ()
        args = kept, list(cotangents), vectors
        specs = jax.tree.map(devices.spec_of, args)

        one = functools.partial(sums_of_left, self._meeting, route, stacked)

        def local(*args):
            kept, cotangents, vectors = jax.tree.map(devices.own, args)
            cotangents = [
                _counted_once(array, set(devices.names) - {*spec, *split})
                for array, spec in zip(cotangents, specs[1])
            ]
            with self._meeting.context():
                found = summed(one, self._meeting, kept, cotangents, vectors)
            return {
                path: jax.lax.psum(sums, [name for name in devices.names if name not in split])
                for path, sums in found.items()
            }

        before = (None,) if stacked else ()
        out_specs = PartitionSpec(*before, split) if split else PartitionSpec()
        # What several devices have alike is told by shapes here.
        return devices.mapped(local, specs, out_specs, False)(*args)


def _counted_once(array: jax.Array, names: Iterable[str]) -> jax.Array:
    """Zeros on all devices but the first along these axes of the mesh."""
    for name in names:
        is_first = jax.lax.axis_index(name) == 0
        array = jnp.where(is_first, array, jnp.zeros_like(array))
    return array


def _array(value: Value, var: Any) -> Any:
    """Literals are numbers."""
    if value.primal is None or isinstance(value.primal, jax.Array):
        return value.primal
    return jnp.asarray(value.primal, var.aval.dtype)


HANDLERS["shard_map"] = _shard_map
