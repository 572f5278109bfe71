"""Claim: on a mesh, dots send little beside what a plain step with a validation gradient sends.

    python -m benchmarks.collectives

A GPT-2-shaped layer (F 256, T 128, vocabulary 2048, tied head), 4 training and 4 validation rows
per device of the data axis, on 1 to 8 virtual CPU devices. Count and bytes (results on one device)
of the collectives in the compiled step, by kind, and scratch memory. Layouts:

replicated   parameters on every device, rows split
fsdp         matrices split over the data axis as well; vectors are on every device
tensor       matrices split over the model axis, of two devices, by Megatron's rules
both         fsdp and tensor
placed       the same, and between layers the model says that activations are split by rows alone

XLA's partitioner for the CPU decides what is sent; for other devices it has other passes behind.
In "both" nothing says where activations should lie, and it splits their features like the matrices
over the data axis: all rows are moved through that axis, in the plain step already. One
``with_sharding_constraint`` a layer ("placed") takes three quarters of that away.
Gradients and direction come out like the parameters, and dots like the rows.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import collections

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks._common import save
from ghostjax import testing, value_and_dots_fn, value_grad_and_dots
from models.measured import setup

ROWS_PER_DEVICE = 4
MESHES = {  # data, model
    "replicated": ((1, 1), (2, 1), (4, 1), (8, 1)),
    "fsdp": ((2, 1), (4, 1), (8, 1)),
    "tensor": ((1, 2), (2, 2), (4, 2)),
    "both": ((2, 2), (4, 2)),
    "placed": ((2, 2), (4, 2)),
}
# Dense_0 and Dense_2 are split by outputs, Dense_1 and Dense_3 by inputs; Embed_0 by tokens.
BY_FIRST_AXIS = ("Dense_1", "Dense_3", "Embed_0")
BY_LAST_AXIS = ("Dense_0", "Dense_2")


def spec_of(layout, path, leaf):
    name = jax.tree_util.keystr(path)
    axes = [None] * leaf.ndim
    if layout in ("tensor", "both", "placed"):
        if any(part in name for part in BY_LAST_AXIS):
            axes[-1] = "model"
        elif any(part in name for part in BY_FIRST_AXIS) and leaf.ndim == 2:
            axes[0] = "model"
    if layout in ("fsdp", "both", "placed") and leaf.ndim == 2:
        axes[axes.index(None)] = "data"
    return PartitionSpec(*axes)


def steps(row_losses):
    def loss_fn(params, batch):
        return row_losses(params, batch).mean()

    def plain(params, train, val):
        return jax.value_and_grad(loss_fn)(params, train), jax.grad(loss_fn)(params, val)

    def early(params, train, val):
        direction = jax.grad(loss_fn)(params, val)
        result = value_grad_and_dots(loss_fn)(params, train, direction=direction)
        return (result.value, result.grads), direction, result.total()

    def late(params, train, val):
        value, grads, dots = value_and_dots_fn(loss_fn)(params, train)
        direction = jax.grad(loss_fn)(params, val)
        return (value, grads), direction, dots.result(direction).total()

    return {"plain + validation": plain, "value_grad_and_dots": early, "late direction": late}


def summary(compiled):
    kinds = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for collective in testing.collectives(compiled):
        kinds[collective.kind]["count"] += 1
        kinds[collective.kind]["bytes"] += collective.bytes
    return {
        "collectives": dict(kinds),
        "bytes": sum(kind["bytes"] for kind in kinds.values()),
        "scratch_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def measure(layout, sizes):
    mesh = jax.make_mesh(
        sizes,
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: sizes[0] * sizes[1]],
    )
    num_rows = ROWS_PER_DEVICE * sizes[0]
    rows = NamedSharding(mesh, PartitionSpec("data"))
    placed = rows if layout == "placed" else None
    row_losses, params, both = setup(2 * num_rows, layers=1, placed=placed)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(layout, path, leaf)), params
    )
    train = jax.device_put(jax.tree.map(lambda leaf: leaf[:num_rows], both), rows)
    val = jax.device_put(jax.tree.map(lambda leaf: leaf[num_rows:], both), rows)
    table, dots = {}, {}
    for name, step in steps(row_losses).items():
        outputs = ((None, shardings), shardings, rows)
        if name == "plain + validation":
            outputs = outputs[:2]
        compiled = (
            jax.jit(step, out_shardings=outputs)
            .lower(jax.device_put(params, shardings), train, val)
            .compile()
        )
        table[name] = summary(compiled)
        if name != "plain + validation":
            dots[name] = compiled(jax.device_put(params, shardings), train, val)[2]
    row_losses, _, _ = setup(2 * num_rows, layers=1)
    alone = jax.jit(steps(row_losses)["value_grad_and_dots"])(
        params, *jax.tree.map(np.asarray, (train, val))
    )[2]
    for found in dots.values():
        testing.assert_dots_close(found, alone)
    return table


def main():
    results = {}
    for layout, meshes in MESHES.items():
        for sizes in meshes:
            name = f"{layout}, {sizes[0]} x {sizes[1]}"
            results[name] = measure(layout, sizes)
            print(f"\n{name}")
            for step, row in results[name].items():
                kinds = ", ".join(
                    f"{of['count']} {kind} {of['bytes'] / 2**20:.2f}"
                    for kind, of in row["collectives"].items()
                )
                print(f"  {step:20s} MiB {row['scratch_mib']:6.1f}, sent {kinds or 'nothing'}")
    save("collectives", results)


if __name__ == "__main__":
    main()
