"""Claim, where a GPU says so: what dots cost at the setting that others publish.

GPT-2 small in float32, B 16, V 8, T 1024, for which figures are published on one A40: 1.72 of a
plain step by GhostSuite, 4.2 by dattri-llm. No figure of our own is published: nothing was measured
on such a machine yet. Sizes are options, so that the command can be tried anywhere. A plain step
is forward, backward and an AdamW update of the B rows.

    python -m benchmarks.published
    python -m benchmarks.published --remat            # less memory
    python -m benchmarks.published --peer             # and dattri-llm, by torch, on the same GPU
    python -m benchmarks.published --layers 1 --features 16 --heads 2 --positions 8 \\
        --vocabulary 32 --rows 4 --val-rows 2         # a laptop
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax

from benchmarks._common import figures, save, times
from ghostjax import GradDotProdEngine, conservation_error, testing, value_grad_and_dots
from models.measured import setup

SIZES = {
    "layers": 12,
    "features": 768,
    "heads": 12,
    "positions": 1024,
    "vocabulary": 50257,
    "rows": 16,
    "val_rows": 8,
}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--remat", action="store_true", help="loop over layers, rematerialised")
    parser.add_argument("--peer", action="store_true", help="dattri-llm too, if it is installed")
    parser.add_argument(
        "--matmul",
        default="highest",
        help="precision of JAX's products; float32 as torch has it by default, not TF32",
    )
    parser.add_argument("--engine", action="store_true", help="the engine too: keeps all factors")
    return parser.parse_args()


def measure(options):
    row_losses, params, both = setup(
        options.rows + options.val_rows,
        layers=options.layers,
        positions=options.positions,
        stacked="scan+remat" if options.remat else "unrolled",
        vocabulary=options.vocabulary,
        features=options.features,
        heads=options.heads,
    )
    train = jax.tree.map(lambda leaf: leaf[: options.rows], both)
    val = jax.tree.map(lambda leaf: leaf[options.rows :], both)
    optimizer = optax.adamw(1e-4)
    state = optimizer.init(params)

    def loss_fn(params, batch):
        return row_losses(params, batch).mean()

    def updated(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def plain(params, state, train, val):
        value, grads = jax.value_and_grad(loss_fn)(params, train)
        return updated(grads, state, params), value

    def with_validation(params, state, train, val):
        direction = jax.grad(loss_fn)(params, val)
        return plain(params, state, train, val), direction

    def direction_form(params, state, train, val):
        direction = jax.grad(loss_fn)(params, val)
        result = value_grad_and_dots(loss_fn)(params, train, direction=direction)
        errors = conservation_error(result, direction)
        return updated(result.grads, state, params), result.total(), errors

    def by_engine(params, state, train, val):
        both = jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), train, val)
        engine = GradDotProdEngine(row_losses, val_batch_size=options.val_rows)
        result = engine(params, both)
        return updated(result.grads, state, params), engine.aggregate(result.dots)

    functions = {
        "plain step": plain,
        "+ validation gradient": with_validation,
        "value_grad_and_dots": direction_form,
    }
    if options.engine:
        functions["GradDotProdEngine"] = by_engine
    args = (params, state, train, val)
    table = {name: figures(function, *args) for name, function in functions.items()}
    compiled = {name: row.pop("compiled") for name, row in table.items()}
    check(compiled, args, loss_fn)
    seconds = times(compiled, dict.fromkeys(compiled, args), options.repeats)
    for name, row in table.items():
        row["time"] = seconds[name] / seconds["plain step"]
    return table


def check(compiled, args, loss_fn):
    """Dots add up for every parameter; that of one row is right by itself; the engine agrees."""
    params, _, train, val = args
    _, dots, errors = compiled["value_grad_and_dots"](*args)
    worst = max(map(float, jax.tree.leaves(errors)))
    assert worst < 1e-4, worst
    first = jax.tree.map(lambda leaf: leaf[:1], train)
    grad = jax.jit(jax.grad(loss_fn))
    pairs = zip(jax.tree.leaves(grad(params, first)), jax.tree.leaves(grad(params, val)))
    alone = sum(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    assert abs(dots[0] - alone) <= 1e-4 * np.max(np.abs(dots)), (dots[0], alone)
    if "GradDotProdEngine" in compiled:
        testing.assert_dots_close(compiled["GradDotProdEngine"](*args)[1], dots, rtol=1e-4)


def of_peer(options):
    """dattri-llm's step over torch's, in a process of its own, which has the GPU to itself."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        sizes = json.dumps({name: getattr(options, name) for name in SIZES})
        command = [sys.executable, "-m", "benchmarks._peers.published", out.name, sizes]
        subprocess.run([*command, str(options.repeats)], check=True)
        return json.load(out)


def main():
    options = parsed()
    jax.config.update("jax_default_matmul_precision", options.matmul)
    sizes = {name: getattr(options, name) for name in SIZES}
    # torch first, as JAX takes most of a GPU's memory when it starts.
    peer = of_peer(options) if options.peer else {}
    table = measure(options) | peer
    for name, row in table.items():
        print(f"{name:36s}{row['time']:8.2f}{row.get('scratch_mib', 0):12.0f} MiB")
    if sizes == SIZES:
        key = "GPT-2 small, B 16, V 8, T 1024" + (", remat" if options.remat else "")
        load = os.getloadavg()
        save("published", {key: {"date": f"{datetime.date.today()}", "load": load, **table}}, True)


if __name__ == "__main__":
    main()
