"""What scores cost in ``ghostjax train``: its steps beside plain ones, on the default job.

    plain      a step of training without scores
    floor      plain + a gradient of each validation set, which any method needs
    order 1/2  a step with scores for both validation sets, their errors, the certificate, and the
               predicted and actual decrease of the loss of a group of each set
    every 4    order 2 at every fourth step

Times are ratios within one run, in which all take turns; a machine that is shared makes them
differ by a tenth or so. Beside the time on the clock there is that of the processor, which others
on the machine disturb less. Compile times are wall-clock and CPU seconds of the first call, without
the compilation cache.
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np

from benchmarks._common import save
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.load import load_task
from ghostjax.runs.training.gradients import PARTS, mean_of
from ghostjax.runs.training.trainer import Trainer, batches

REPEATS = 40


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    config = TrainConfig(pathlib.Path("unused"))
    task = load_task(config)
    batch = next(batches(config, task))
    trainers = {order: Trainer(dataclasses.replace(config, order=order), task) for order in (1, 2)}
    trainer = trainers[2]
    params = task.init_params(config.seed)
    sets = len(task.val_sizes)

    @jax.jit
    def val_gradients(params, rows):
        rows = jax.tree.map(lambda leaf: leaf.reshape(sets, -1, *leaf.shape[3:]), rows)
        return jax.lax.map(lambda own: jax.grad(mean_of(task.row_losses))(params, own), rows)

    def fresh():
        # A step uses its state up.
        return trainer.init_state(jax.tree.map(jax.numpy.copy, params))

    states = {name: fresh() for name in ("plain", "floor", 1, 2)}

    def plain(name):
        states[name], losses = trainer._plain_step(states[name], batch.train_rows)
        return losses

    def floor():
        gradients = val_gradients(states["floor"].params, batch.val_rows)
        return plain("floor"), gradients

    def scored(order):
        step = trainers[order]._step
        states[order], record = step(states[order], batch.train_rows, batch.val_rows)
        return record

    functions = {
        "plain": lambda: plain("plain"),
        "floor": floor,
        "order 1": lambda: scored(1),
        "order 2": lambda: scored(2),
    }
    compiling = {}
    for name, function in functions.items():
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        spent = time.perf_counter() - wall, time.process_time() - cpu
        compiling[name] = {"wall_s": round(spent[0], 1), "cpu_s": round(spent[1], 1)}
    samples = {name: np.empty((REPEATS, 2)) for name in functions}
    for repeat in range(REPEATS):
        for name, function in functions.items():
            begin = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(function())
            samples[name][repeat] = [time.perf_counter(), time.process_time()] - begin
    seconds = {name: np.median(own, axis=0) for name, own in samples.items()}
    seconds["every 4"] = (seconds["order 2"] + 3 * seconds["plain"]) / 4
    table = {
        name: {
            "ms": round(1e3 * own[0], 1),
            "cpu_ms": round(1e3 * own[1], 1),
            "time": round(own[0] / seconds["plain"][0], 2),
            "over_floor": round(own[0] / seconds["floor"][0], 2),
            "cpu_over_floor": round(own[1] / seconds["floor"][1], 2),
        }
        for name, own in seconds.items()
    }
    for name, row in table.items():
        print(f"{name:10s}" + "".join(f"{key:>16s} {value:6.2f}" for key, value in row.items()))
    for name, row in compiling.items():
        print(f"compiling {name:10s} {row}")
    shape = {
        "batch_size": config.batch_size,
        "sets": sets,
        "val_batch_size": config.val_batch_size,
        "parts": PARTS,
        "parameters": int(sum(np.size(leaf) for leaf in jax.tree.leaves(params))),
    }
    save("run_cost", {"shape": shape, "steps": table, "compiling": compiling})


if __name__ == "__main__":
    main()
