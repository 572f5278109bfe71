"""On which devices the arrays of a run are.

A mesh has two axes, ``data`` and ``model``. Rows are split over ``data``, those of validation sets
too. An array of the parameters or of the optimizer's state is split

    over ``model`` as MODEL_AXES says for its name, where the axis can be divided; and
    with ``--fsdp``, over ``data`` along the largest other axis that can be divided, the first of
    several;

what cannot be divided, and all else, is whole on every device. The step itself knows nothing of
this: its losses and its optimizer say where their arrays are, and XLA does the rest.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.errors import UsageError
from ghostjax.runs.training.gradients import PARTS

# For the built-in models: the axis of an array that is split over ``model``, by the end of its
# path. Matrices come in pairs, of which the first is split over its outputs and the second over its
# inputs, as in Megatron-LM (arXiv:1909.08053).
MODEL_AXES = (
    (re.compile(r"\['(qkv|up|dense|classes)'\]\['(kernel|bias)'\]$"), -1),
    (re.compile(r"\['(attention|down)'\]\['kernel'\]$"), -2),
    (re.compile(r"\['tokens'\]\['embedding'\]$"), 0),
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run are.

    Attributes:
      mesh: axes ``data`` and ``model``; None for one device, JAX's default.
      fsdp: whether parameters and optimizer state are split over ``data``.
    """

    mesh: Mesh | None = None
    fsdp: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return {"data": 1, "model": 1} if self.mesh is None else dict(self.mesh.shape)

    def spec(self, path: str, shape: Sequence[int]) -> PartitionSpec:
        """How an array of parameters or optimizer state is split, as the module says.

        >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
        >>> tuple(Placement(mesh, fsdp=True).spec("['blocks']['up']['kernel']", (2, 16, 64)))
        (None, 'data', 'model')
        """
        axes: list[str | None] = [None] * len(shape)
        sizes = self.sizes
        own = next((axis for name, axis in MODEL_AXES if name.search(path)), None)
        if sizes["model"] > 1 and own is not None and -len(shape) <= own < len(shape):
            axes[own] = "model" if _divides(sizes["model"], shape[own]) else None
        if self.fsdp and sizes["data"] > 1:
            free = [n for n, axis in enumerate(axes) if axis is None]
            fits = [n for n in free if _divides(sizes["data"], shape[n])]
            if fits:
                axes[max(fits, key=lambda n: shape[n])] = "data"
        while axes and axes[-1] is None:
            axes.pop()
        return PartitionSpec(*axes)

    def made(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives: for several devices in the host's memory, as it may be more than one
        of them can hold."""
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS does not name it
            return make()
        with contextlib.nullcontext() if self.mesh is None else jax.default_device(host):
            return make()

    def state(self, tree: Any) -> Any:
        """Arrays of parameters or optimizer state, put where they belong; they are used up."""
        if self.mesh is None:
            return tree

        def put(path, leaf):
            place = self._place(path, leaf)
            if place.is_fully_addressable:
                return jax.device_put(leaf, place, donate=True)
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

        return jax.tree_util.tree_map_with_path(put, tree)

    def shapes(self, tree: Any) -> Any:
        """Shapes of arrays as ``state`` takes them, with the places they belong to."""
        if self.mesh is None:
            return tree

        def placed(path, leaf):
            place = self._place(path, leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree_util.tree_map_with_path(placed, tree)

    def rows(self, tree: Any) -> Any:
        """Training rows, NumPy arrays [B, ...], split over ``data``."""
        return self._put(tree, PartitionSpec("data"))

    def val_rows(self, tree: Any) -> Any:
        """Validation rows, NumPy arrays [K, PARTS, n, ...], whole on every device: a step takes
        them in parts and groups, each of which ``losses`` splits. A process needs those of
        ``read_val_rows`` alone, as the devices give them to each other."""
        if self.mesh is None:
            return jax.device_put(tree)
        return _gather(self.mesh)(self._put(tree, PartitionSpec(None, None, "data")))

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        if self.mesh is None:
            return jax.device_put(tree)  # once, not by each of a step's functions
        place = NamedSharding(self.mesh, spec)

        def put(leaf):
            return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

        return jax.tree.map(put, jax.tree.map(np.asarray, tree))

    def losses(self, row_losses: Callable[[Any, Any], jax.Array]):
        """The same losses, which say where parameters and rows are, and so their gradients."""
        if self.mesh is None:
            return row_losses
        over_data = NamedSharding(self.mesh, PartitionSpec("data"))

        def hold(leaf):
            # An audit redoes single rows.
            if not _divides(self.sizes["data"], leaf.shape[0]):
                return leaf
            return jax.lax.with_sharding_constraint(leaf, over_data)

        def placed(params, rows):
            return row_losses(self._held(params), jax.tree.map(hold, rows))

        return placed

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """The same optimizer, which says where its state and updates are."""
        if self.mesh is None:
            return tx
        inner = optax.with_extra_args_support(tx)

        def update(grads, state, params=None, **extra_args):
            updates, state = inner.update(grads, state, params, **extra_args)
            return self._held(updates), self._held(state)

        return optax.GradientTransformationExtraArgs(
            lambda params: self._held(inner.init(params)), update
        )

    def fetch(self, tree: Any) -> Any:
        """Results of jitted functions as NumPy arrays, whole in every process."""
        leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        if not all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
            tree = _gather(self.mesh)(tree)
        return jax.tree.map(np.asarray, tree)

    def own_rows(self, count: int) -> np.ndarray:
        """Which of a batch's rows this process writes to the log: those of its devices along
        ``data``, each in one process."""
        if self.mesh is None:
            return np.arange(count)
        owners = [device.process_index for device in self.mesh.devices[:, 0]]
        return np.flatnonzero(np.repeat(owners, count // len(owners)) == jax.process_index())

    def read_rows(self, count: int) -> np.ndarray:
        """Which of a batch's rows this process has to read: those of any of its devices."""
        if self.mesh is None:
            return np.arange(count)
        own = np.vectorize(lambda device: device.process_index)(self.mesh.devices)
        is_own = (own == jax.process_index()).any(1)
        return np.flatnonzero(np.repeat(is_own, count // len(is_own)))

    def read_val_rows(self, count: int) -> np.ndarray:
        """As ``read_rows``, of the ``count`` rows of a validation set in PARTS."""
        parts = np.arange(count).reshape(PARTS, -1)
        return parts[:, self.read_rows(parts.shape[1])].reshape(-1)

    def as_json(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        found = {"mesh": _text(self.sizes), "fsdp": self.fsdp, "kind": device.device_kind}
        return {**found, "processes": jax.process_count()}

    def _held(self, tree: Any) -> Any:
        def hold(path, leaf):
            return jax.lax.with_sharding_constraint(leaf, self._place(path, leaf))

        return jax.tree_util.tree_map_with_path(hold, tree)

    def _place(self, path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(jax.tree_util.keystr(path), leaf.shape))


ONE_DEVICE = Placement()


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def make_placement(config: TrainConfig) -> Placement:
    """The mesh of a run, over the devices that JAX finds.

    Raises:
      UsageError: there are not as many devices, or rows or parameters cannot be divided over them.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError(f"this is one of {jax.process_count()} processes: give --distributed")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    wanted = config.mesh_sizes
    model = wanted.get("model", 1)
    sizes = {"data": wanted.get("data", max(len(devices) // model, 1)), "model": model}
    count, found = math.prod(sizes.values()), f"{len(devices)} {devices[0].platform} devices"
    if count > len(devices):
        raise UsageError(
            f"--mesh {_text(sizes)} takes {count} devices, found {found}: give one of as many or "
            "fewer"
        )
    if jax.process_count() > 1 and count < len(devices):
        raise UsageError(
            f"--mesh {_text(sizes)} takes {count} devices, found {found}: several processes take "
            f"all of theirs, as --mesh model={model} does"
        )
    _check_rows(config, sizes, found)
    if model > 1 and config.task is not None:
        raise UsageError(
            f"--mesh model={model} is for the built-in models, whose parameters it knows by name: "
            "for a task of your own take --fsdp, which splits all that can be divided over data"
        )
    if count == 1:
        return ONE_DEVICE
    grid = np.array(devices[:count]).reshape(sizes["data"], sizes["model"])
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto, AxisType.Auto))
    return Placement(mesh, config.fsdp)


def check_params(placement: Placement, params: Any) -> None:
    """Raises ``UsageError`` where ``model`` divides no parameter."""
    size = placement.sizes["model"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    specs = [placement.spec(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]
    if size > 1 and not any("model" in spec for spec in specs):
        shapes = ", ".join(f"{jax.tree_util.keystr(path)} {leaf.shape}" for path, leaf in leaves)
        raise UsageError(f"--mesh model={size} divides no parameter of the model: {shapes}")


def _check_rows(config: TrainConfig, sizes: dict[str, int], found: str) -> None:
    devices = sizes["data"]
    parts = {"batch_size": config.microbatches, "val_batch_size": PARTS}
    whole = math.gcd(*(getattr(config, name) // count for name, count in parts.items()))
    fits = max(size for size in range(1, devices + 1) if whole % size == 0)
    for name, count in parts.items():
        size, unit = getattr(config, name), count * devices
        if size % unit == 0:
            continue
        each = "" if count == 1 else f", in {count} parts,"
        nearest = [near for near in (size // unit * unit, -(-size // unit) * unit) if near]
        raise UsageError(
            f"--{name.replace('_', '-')} {size}{each} cannot be divided over the {devices} devices "
            f"of data in --mesh {_text(sizes)} (found {found}): {' and '.join(map(str, nearest))} "
            f"can, or take --mesh {_text({**sizes, 'data': fits})}"
        )


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _divides(count: int, size: int) -> bool:
    return size > 0 and size % count == 0
