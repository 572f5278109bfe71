"""Rows through pallas_call: what is shown holds when one row changes, what is not shown is lost."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ghostjax import testing
from ghostjax.core.places import Mixed, Rows, infer
from models.arrays import draw
from tests.dots import kernels

B, T, F = 4, 2, 4
X, X3, SCALE = draw(B, F), draw(B, T, F), draw(1, F, seed=1)
ROW, SHARED = pl.BlockSpec((1, F), lambda i: (i, 0)), pl.BlockSpec((1, F), lambda i: (0, 0))
PAIR = pl.BlockSpec((2, F), lambda i: (i, 0))
FIRST = Rows(0)
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


def shown(name, fn, expected=FIRST, x=X, rows=FIRST, num_rows=B):
    return pytest.param(fn, expected, x, rows, num_rows, id=name)


FLAT = X3.reshape(-1, F)
SHOWN = [
    shown("a row a block", lambda x: call(doubled, x)),
    shown("constants", lambda x: call(scaled, x, SCALE, ins=[ROW, SHARED])),
    shown("two operands", lambda x: call(added, x, x + 1, ins=[ROW, ROW])),
    shown("reversed", lambda x: call(doubled, x, ins=[pl.BlockSpec((1, F), shifted)],
                                     outs=pl.BlockSpec((1, F), shifted))),
    shown("another axis", lambda x: call(
        transposed, x, outs=pl.BlockSpec((F, 1), lambda i: (0, i)), shape=(F, B)),
          expected=Rows(1)),
    shown("scratch written first", lambda x: call(in_two_passes, x, scratch=[VMEM])),
    shown("scratch cleared by row", steps(functools.partial(at_steps, first=lambda j: j == 0)),
          x=X3),
    shown("scratch cleared by row, in order",
          steps(functools.partial(at_steps, first=lambda j: j == 0),
                **parallel("parallel", "arbitrary")), x=X3),
    shown("an output that is written often", steps(summed_into, out=LAST), x=X3),
    shown("positions of merged rows", lambda x: call(doubled, x, grid=(B * T,), shape=(B * T, F)),
          x=FLAT, rows=Rows(0, 1, T), expected=Rows(0, 1, T)),
    shown("rows inside", lambda x: call(doubled, x, grid=(B * T,), shape=(B * T, F)),
          x=FLAT, rows=Rows(0, T, 1), expected=Rows(0, T, 1)),
    shown("heads by division", lambda x: call(
        doubled, x, grid=(B * T,), shape=(B * T, F),
        ins=[pl.BlockSpec((None, 1, F), lambda i: (i // T, i % T, 0))]),
          x=X3, expected=Rows(0, 1, T)),
    shown("windows", lambda x: call(
        halves_added, x, grid=(B, 2),
        ins=[pl.BlockSpec((1, pl.Element(3)), lambda i, j: (i, j))],
        outs=pl.BlockSpec((1, 2), lambda i, j: (i, j))), x=X),
    shown("aliased", lambda x: call(doubled, x, input_output_aliases={0: 0})),
    shown("aliased with a constant", lambda x: call(
        added, x, jnp.ones((B, F)), ins=[ROW, ROW], input_output_aliases={1: 0})),
    shown("two rows a block", lambda x: call(softmax, x, grid=(2,), ins=[PAIR], outs=PAIR)),
    shown("all rows in a block", lambda x: pl.pallas_call(
        softmax, out_shape=kernels.like(B, F), interpret=True)(x)),
    shown("two rows a block, branches", lambda x: call(
        in_a_branch,
        x, grid=(2,), ins=[PAIR], outs=PAIR)),
    shown("two rows a block, transposed", lambda x: call(
        transposed, x, grid=(1,),
        ins=[pl.BlockSpec((B, F), lambda i: (0, 0))], outs=pl.BlockSpec((F, B), lambda i: (0, 0)),
        shape=(F, B)), expected=Rows(1)),
    shown("vmap of rows", lambda x: jax.vmap(steps(
        functools.partial(at_steps, first=lambda j: j == 0)))(x), x=draw(3, B, T, F),
          num_rows=3),
    shown("vmap of other things", lambda x: jax.vmap(steps(
        functools.partial(at_steps, first=lambda j: j == 0)))(x), x=draw(3, B, T, F),
          rows=Rows(1), expected=Rows(1)),
    shown("one row", lambda x: call(softmax, x, grid=(1,), ins=[ROW], shape=(1, F)), x=X[:1],
          num_rows=1),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "expected", "x", "rows", "num_rows"), SHOWN)
def test_shown(fn, expected, x, rows, num_rows):
    (found,) = infer(jax.make_jaxpr(fn)(x), [rows], num_rows)
    assert found == expected
    if num_rows > 1:
        testing.assert_rowwise(*in_rows(fn, x, rows, found, num_rows), derivatives=False)


def in_rows(fn, x, rows, found, num_rows):
    """The function with rows in front of its argument and its result."""

    def split(array, place):
        shape, axis = array.shape, place.axis
        parts = (place.outer, num_rows, place.inner)
        array = array.reshape(*shape[:axis], *parts, *shape[axis + 1 :])
        return jnp.moveaxis(array, axis + 1, 0)

    def of_rows(front):
        return split(fn(jnp.moveaxis(front, 0, rows.axis + 1).reshape(x.shape)), found)

    return of_rows, [split(x, rows)]


def lost(name, fn, message, x=X, rows=FIRST, num_rows=B):
    return pytest.param(fn, message, x, rows, num_rows, id=name)


LOST = [
    lost("another row's place", lambda x: call(doubled, x, ins=[pl.BlockSpec((1, F), shifted)],
                                               shape=(B, F), outs=SHARED),
         "for several rows at once"),
    lost("different rows of operands", lambda x: call(
        added, x, x + 1, ins=[ROW, pl.BlockSpec((1, F), shifted)]), "reads different rows"),
    lost("scratch of other rows", steps(functools.partial(at_steps, first=lambda j: j < 0)),
         "may read from scratch memory", x=X3),
    lost("scratch cleared once", steps(
        functools.partial(at_steps, first=lambda i: i == 0, axis=0)),
         "may read from scratch", x=X3),
    lost("scratch cleared at another step", steps(
        functools.partial(at_steps, first=lambda j: j == 1)), "may read from scratch", x=X3),
    lost("scratch cleared by an axis in any order", steps(
        functools.partial(at_steps, first=lambda j: j == 0), **parallel("arbitrary", "parallel")),
         "may read from scratch", x=X3),
    lost("scratch read before it is written", steps(read_late), "may read from scratch", x=X3),
    lost("rows on the axis that moves fastest", steps(
        functools.partial(at_steps, first=lambda j: j == 0)), "may read from scratch", x=X3,
         rows=Rows(1), num_rows=T),
    lost("part of the scratch", lambda x: call(
        in_part_of_scratch, x, scratch=[VMEM]), "may read from scratch"),
    lost("an operand without rows", lambda x: call(
        through_an_operand, x, SCALE, ins=[ROW, SHARED]),
         "writes to an operand without rows"),
    lost("an output of all rows", lambda x: call(
        running_sum, x, outs=[ROW, SHARED],
        shape=[(B, F), (1, F)])[0], "may read from an output that other rows write"),
    lost("an output that others read", lambda x: call(
        added, x, jnp.ones((B, F)), ins=[ROW, SHARED], input_output_aliases={1: 0}),
         "shares memory"),
    lost("rows by prefetched scalars", lambda x: prefetched(x, jnp.arange(B)), "is not known"),
    lost("prefetched rows", lambda x: lengths(jnp.ones((B, F)), x[:, 0].astype(int)),
         "in scalars that are prefetched"),
    lost("cut", lambda x: call(doubled, x, grid=(2,), ins=[pl.BlockSpec((3, F), lambda i: (i, 0))],
                               outs=pl.BlockSpec((3, F), lambda i: (i, 0)), shape=(6, F)),
         "blocks that cut rows", x=draw(6, F), rows=Rows(0, 1, 2), num_rows=3),
    lost("statistics of a block", lambda x: call(
        centred,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "mixes the rows"),
    lost("statistics of a block in a call", lambda x: call(
        softmax_of_rows,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "mixes the rows"),
    lost("one row of a block", lambda x: call(
        first_added,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "mixes the rows"),
    lost("a place of a block that rows say", lambda x: call(
        from_where_rows_say,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "mixes the rows"),
    lost("rows of a block swapped", lambda x: call(
        swapped,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "mixes the rows"),
    lost("a branch that rows say", lambda x: call(
        if_rows_say,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "branches as rows say"),
    lost("a loop over a block", lambda x: call(
        swapped_in_a_loop,
        x, grid=(2,), ins=[PAIR], outs=PAIR), "on blocks of several rows"),
    lost("scratch between blocks of rows", lambda x: call(
        carried, x, grid=(2,), ins=[PAIR], outs=PAIR,
        scratch=[pltpu.VMEM((2, F), jnp.float32)]), "may read from scratch"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "message", "x", "rows", "num_rows"), LOST)
def test_lost(fn, message, x, rows, num_rows):
    (found,) = infer(jax.make_jaxpr(fn)(x), [rows], num_rows)
    assert isinstance(found, Mixed)
    assert re.search(message, found.reason), found.reason
    promised = "ghostjax.rowwise" in found.reason
    assert promised or "for several rows at once" in found.reason


def all_added(x_ref, y_ref, sum_ref):
    doubled(x_ref, y_ref)
    sum_ref[...] += x_ref[...].sum(0, keepdims=True)


def added_in_a_loop(x_ref, y_ref, sum_ref):
    @pl.loop(0, 2)
    def _(i):
        sum_ref[...] += x_ref[...] * i

    doubled(x_ref, y_ref)


def leaks_through(how):
    """What all rows have added up gets to a row in a roundabout way."""

    def kernel(x_ref, y_ref, sum_ref, kept_ref):
        if how == "memory":
            kept_ref[...] = sum_ref[...]
            y_ref[...] = kept_ref[...]
        elif how == "a branch":
            y_ref[...] = x_ref[...]
            pl.when(sum_ref[0, 0] > 0)(lambda: doubled(x_ref, y_ref))
        elif how == "an index":
            y_ref[...] = x_ref[:, pl.ds(sum_ref[0, 0].astype(int), F)]
        elif how == "a loop":
            start = sum_ref[0, 0]
            y_ref[...] = x_ref[...] * jax.lax.fori_loop(0, 2, lambda _, c: c + start, 0.0)
        elif how == "a while loop":
            stop = sum_ref[0, 0]
            y_ref[...] = x_ref[...] * jax.lax.while_loop(lambda c: c < stop, lambda c: c + 1, 0.0)
        elif how == "memory of its own":

            def scoped(own_ref):
                own_ref[...] = sum_ref[...]
                y_ref[...] = own_ref[...]

            pl.run_scoped(scoped, VMEM)
        sum_ref[...] += x_ref[...]

    return kernel


def with_sum(kernel, block=ROW, **options):
    def fn(x):
        shape = [(B, F), (1, F)]
        grid = (B // block.block_shape[0],)
        return call(kernel, x, grid=grid, ins=[block], outs=[block, SHARED], shape=shape, **options)

    return jax.make_jaxpr(fn)(X)


@pytest.mark.parametrize(
    ("kernel", "block"),
    [(last_seen, ROW), (all_added, ROW), (all_added, PAIR), (added_in_a_loop, ROW)],
)
def test_other_outputs_keep_their_rows(kernel, block):
    """An output that all rows write is lost alone."""
    rows, summed = infer(with_sum(kernel, block), [Rows(0)], B)
    assert rows == Rows(0)
    assert isinstance(summed, Mixed)


@pytest.mark.parametrize(
    "how", ["memory", "a branch", "an index", "a loop", "a while loop", "memory of its own"]
)
def test_other_outputs_lose_their_rows(how):
    found, summed = infer(with_sum(leaks_through(how), scratch=[VMEM]), [Rows(0)], B)
    assert isinstance(summed, Mixed)
    assert "may read from an output that other rows write" in found.reason
