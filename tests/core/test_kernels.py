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
from tests.core.kernels import (
    LAST,
    PAIR,
    ROW,
    SCALE,
    SHARED,
    VMEM,
    X3,
    B,
    F,
    T,
    X,
    added,
    at_steps,
    call,
    carried,
    centred,
    doubled,
    first_added,
    from_where_rows_say,
    halves_added,
    if_rows_say,
    in_a_branch,
    in_part_of_scratch,
    in_two_passes,
    last_seen,
    lengths,
    parallel,
    prefetched,
    read_late,
    running_sum,
    scaled,
    shifted,
    softmax,
    softmax_of_rows,
    steps,
    summed_into,
    swapped,
    swapped_in_a_loop,
    through_an_operand,
    transposed,
)
from tests.dots import kernels

FIRST = Rows(0)


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
