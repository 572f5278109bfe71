"""Claim: explain says beforehand what a step with dots takes on each device, and sends.

    python -m benchmarks.explained_memory

Scratch memory that ``explain`` estimates from shapes, beside that of the compiled step (XLA's own
figure, on virtual CPU devices): the plain step, ``value_grad_and_dots``, and ``value_and_dots_fn``
with its dots, all without the validation gradient. Models of ``models/measured.py`` on one
device, and a GPT-2-shaped layer in the layouts of ``benchmarks/collectives.py``, with what dots add
to the bytes that are sent, estimated and compiled.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks._common import save
from benchmarks.collectives import ROWS_PER_DEVICE, spec_of
from ghostjax import explain, testing, value_and_dots_fn, value_grad_and_dots
from models.measured import cnn, mlp, setup

MODELS = {
    "GPT-2 shape": lambda: setup(8),
    "the same, scan": lambda: setup(8, stacked="scan"),
    "the same, scan and remat": lambda: setup(8, stacked="scan+remat"),
    "MLP": lambda: mlp(1024),
    "CNN": lambda: cnn(64),
}
MESHES = {"replicated": (4, 1), "fsdp": (4, 1), "tensor": (4, 2), "placed": (4, 2)}


def steps(loss_fn):
    def plain(params, batch, direction):
        del direction
        return jax.grad(loss_fn)(params, batch)

    def early(params, batch, direction):
        result = value_grad_and_dots(loss_fn)(params, batch, direction=direction)
        return result.grads, result.dots

    def late(params, batch, direction):
        _, grads, dots = value_and_dots_fn(loss_fn)(params, batch)
        return grads, dots(direction)

    return {"plain": plain, "value_grad_and_dots": early, "value_and_dots_fn": late}


def measure(row_losses, params, batch, outputs=None):
    """By step, MiB of scratch and bytes sent beside the plain step, estimated and compiled."""

    def loss_fn(params, batch):
        return row_losses(params, batch).mean()

    memory = explain(loss_fn)(params, batch).memory
    table, base = {}, 0
    estimates = zip(
        (memory.plain_scratch, memory.scratch, memory.late_scratch),
        ({}, memory.sent, memory.late_sent),
    )
    for (name, step), (scratch, sent) in zip(steps(loss_fn).items(), estimates):
        shardings = outputs and (outputs[0] if name == "plain" else outputs)
        compiled = jax.jit(step, out_shardings=shardings).lower(params, batch, params).compile()
        found = sum(own.bytes for own in testing.collectives(compiled))
        base = found if name == "plain" else base
        table[name] = {
            "estimate_mib": scratch / 2**20,
            "compiled_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            "estimated_sent_mib": sum(sent.values()) / 2**20,
            "compiled_sent_mib": (found - base) / 2**20,
        }
    return table


def on_mesh(layout, sizes):
    axes = ("data", "model")
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 2, devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    placed = rows if layout == "placed" else None
    row_losses, params, batch = setup(ROWS_PER_DEVICE * sizes[0], layers=1, placed=placed)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(layout, path, leaf)), params
    )
    params, batch = jax.device_put(params, shardings), jax.device_put(batch, rows)
    return measure(row_losses, params, batch, (shardings, rows))


def main():
    results = {name: measure(*model()) for name, model in MODELS.items()}
    for layout, sizes in MESHES.items():
        results[f"{layout}, {sizes[0]} x {sizes[1]}"] = on_mesh(layout, sizes)
    for name, table in results.items():
        print(f"\n{name}: MiB estimated, compiled; sent beside the plain step")
        for step, row in table.items():
            print(f"  {step:20s}" + "".join(f"{value:9.2f}" for value in row.values()))
    save("explained_memory", results)


if __name__ == "__main__":
    main()
