"""Kernels in Pallas, of which rows are followed or lost, and how they are called."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.arrays import draw
from tests.dots import kernels

B, T, F = 4, 2, 4
X, X3, SCALE = draw(B, F), draw(B, T, F), draw(1, F, seed=1)
ROW, SHARED = pl.BlockSpec((1, F), lambda i: (i, 0)), pl.BlockSpec((1, F), lambda i: (0, 0))
PAIR = pl.BlockSpec((2, F), lambda i: (i, 0))
VMEM = pltpu.VMEM((1, F), jnp.float32)


def call(kernel, *arrays, grid=(B,), ins=(ROW,), outs=ROW, shape=(B, F), scratch=(), **options):
    outputs = [kernels.like(*s) for s in shape] if isinstance(outs, list) else kernels.like(*shape)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=list(ins),
        out_specs=outs,
        out_shape=outputs,
        scratch_shapes=list(scratch),
        interpret=True,
        **options,
    )(*arrays)


def doubled(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]


def scaled(x_ref, scale_ref, y_ref):
    y_ref[...] = x_ref[...] * scale_ref[...]


def added(x_ref, y_ref, z_ref):
    z_ref[...] = x_ref[...] + y_ref[...]


def softmax(x_ref, y_ref):
    x = x_ref[...]
    weights = jnp.exp(x - x.max(-1, keepdims=True))
    y_ref[...] = weights / weights.sum(-1, keepdims=True)


def in_two_passes(x_ref, y_ref, kept_ref):
    kept_ref[...] = x_ref[...]
    y_ref[...] = kept_ref[...] * 2


def at_steps(x_ref, y_ref, kept_ref, *, first, axis=1):
    """[B, T, F] in grid (B, T): adds positions up in memory that ``first`` clears."""

    @pl.when(first(pl.program_id(axis)))
    def _():
        kept_ref[...] = jnp.zeros_like(kept_ref)

    kept_ref[...] += x_ref[...]
    y_ref[...] = kept_ref[...]


def read_late(x_ref, y_ref, kept_ref):
    """Cleared where it is not read first."""

    @pl.when(pl.program_id(1) == 1)
    def _():
        y_ref[...] = kept_ref[...]
        kept_ref[...] = x_ref[...]


def halves_added(x_ref, y_ref):
    y_ref[...] = x_ref[:, :2] + x_ref[:, 1:]


def transposed(x_ref, y_ref):
    y_ref[...] = x_ref[...].T


def in_a_branch(x_ref, y_ref):
    pl.when(pl.program_id(0) >= 0)(lambda: doubled(x_ref, y_ref))


def in_part_of_scratch(x_ref, y_ref, kept_ref):
    kept_ref[0, :2] = x_ref[0, :2]
    y_ref[...] = kept_ref[...]


def carried(x_ref, y_ref, kept_ref):
    y_ref[...] = x_ref[...] + kept_ref[...]
    kept_ref[...] = x_ref[...]


def through_an_operand(x_ref, c_ref, y_ref):
    y_ref[...] = x_ref[...] + c_ref[...]
    c_ref[...] = x_ref[...]


def running_sum(x_ref, y_ref, sum_ref):
    sum_ref[...] += x_ref[...]
    y_ref[...] = sum_ref[...]


def last_seen(x_ref, y_ref, seen_ref):
    doubled(x_ref, y_ref)
    seen_ref[...] = x_ref[...]


# Of two rows a block:


def centred(x_ref, y_ref):
    y_ref[...] = x_ref[...] - x_ref[...].mean(0, keepdims=True)


def softmax_of_rows(x_ref, y_ref):
    y_ref[...] = jax.nn.softmax(x_ref[...], axis=0)


def first_added(x_ref, y_ref):
    y_ref[...] = x_ref[...] + x_ref[0:1]


def from_where_rows_say(x_ref, y_ref):
    y_ref[...] = x_ref[:, pl.ds(x_ref[0, 0].astype(int) * 0, F)]


def swapped(x_ref, y_ref):
    y_ref[0] = x_ref[1]
    y_ref[1] = x_ref[0]


def swapped_in_a_loop(x_ref, y_ref):
    @pl.loop(0, 2)
    def _(i):
        y_ref[i] = x_ref[1 - i]


def if_rows_say(x_ref, y_ref):
    pl.when(x_ref[0, 0] > 0)(lambda: doubled(x_ref, y_ref))


STEP = pl.BlockSpec((None, 1, F), lambda i, j: (i, j, 0))
LAST = pl.BlockSpec((None, 1, F), lambda i, j: (i, 0, 0))


def steps(kernel, out=STEP, grid=(B, T), x=X3, **options):
    shape = x.shape if out is STEP else (B, 1, F)
    return lambda x: call(
        kernel, x, grid=grid, ins=[STEP], outs=out, shape=shape, scratch=[VMEM], **options
    )


def parallel(*kinds):
    return {"compiler_params": pltpu.CompilerParams(dimension_semantics=kinds)}


def summed_into(x_ref, y_ref, _):
    @pl.when(pl.program_id(1) == 0)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    y_ref[...] += x_ref[...]


def shifted(i):
    return (i + 1) % B, 0


def prefetched(x, index):
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B,),
        in_specs=[pl.BlockSpec((1, F), lambda i, index_ref: (index_ref[i], 0))],
        out_specs=pl.BlockSpec((1, F), lambda i, index_ref: (i, 0)),
    )

    def kernel(index_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...]

    options = {"out_shape": kernels.like(B, F), "interpret": True}
    return pl.pallas_call(kernel, grid_spec=spec, **options)(index, x)


def lengths(x, index):
    """Scalars for all steps, of which the kernel takes its row's."""
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B,),
        in_specs=[pl.BlockSpec((1, F), lambda i, _: (i, 0))],
        out_specs=pl.BlockSpec((1, F), lambda i, _: (i, 0)),
    )

    def kernel(index_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...] * index_ref[pl.program_id(0)].astype(x_ref.dtype)

    options = {"out_shape": kernels.like(B, F), "interpret": True}
    return pl.pallas_call(kernel, grid_spec=spec, **options)(index, x)
