"""Steps that move rows, and steps that run others on some of them."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.state import Step, Values, run_steps


def _each(function: Callable, values: Values) -> Values:
    """Of every array that there is."""
    return jax.tree.map(function, values)


def _moving(text: str, function: Callable, after: Callable[[str], str] = lambda kind: kind) -> Step:
    """``function(array, kind)`` acts on leading axes."""

    def run(reading, values, kind):
        return _each(lambda array: function(array, kind), values), after(kind)

    return Step(text, run, moves_rows=True)


SWAPPED = {"bt": "tb", "tb": "bt"}
SWAP = _moving("swap rows and positions", lambda a, kind: jnp.swapaxes(a, 0, 1), SWAPPED.get)
MERGE = _moving(
    "merge rows and positions",
    lambda a, kind: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]),
    lambda kind: "n",
)


def split(sizes: tuple[int, int], kind: str) -> Step:
    return _moving(
        f"split into {kind} {sizes}", lambda a, _: a.reshape(*sizes, *a.shape[1:]), lambda _: kind
    )


# By name ``move(array, order, axis)`` with an order that is known; ``gather`` is what they all do.
ORDERED = {
    "a[order]": lambda a, order, axis: a[(slice(None),) * axis + (order,)],
    "take": lambda a, order, axis: jnp.take(a, jnp.asarray(order), axis=axis),
    "take, clipped": lambda a, order, axis: jnp.take(a, jnp.asarray(order), axis=axis, mode="clip"),
    "stack": lambda a, order, axis: jnp.stack(
        [lax.index_in_dim(a, int(k), axis, keepdims=False) for k in order], axis=axis
    ),
    "concatenate": lambda a, order, axis: jnp.concatenate(
        [lax.slice_in_dim(a, int(k), int(k) + 1, axis=axis) for k in order], axis=axis
    ),
    "dynamic slices": lambda a, order, axis: jnp.concatenate(
        [lax.dynamic_slice_in_dim(a, int(k), 1, axis=axis) for k in order], axis=axis
    ),
    "at[].set": lambda a, order, axis: jnp.moveaxis(
        jnp.zeros_like(jnp.moveaxis(a, axis, 0))
        .at[np.argsort(order)]
        .set(jnp.moveaxis(a, axis, 0)),
        0,
        axis,
    ),
    "dynamic updates": lambda a, order, axis: _updated(a, order, axis),
    "loop": lambda a, order, axis: jnp.moveaxis(
        lax.map(lambda k: lax.dynamic_index_in_dim(a, k, axis, keepdims=False), jnp.asarray(order)),
        0,
        axis,
    ),
    "vmap": lambda a, order, axis: jax.vmap(
        lambda k: lax.dynamic_index_in_dim(a, k, axis, keepdims=False), out_axes=axis
    )(jnp.asarray(order)),
    "one-hot product": lambda a, order, axis: _by_product(a, order, axis),
}


def _updated(a, order, axis):
    out = jnp.zeros_like(a)
    for k, source in enumerate(order):
        part = lax.slice_in_dim(a, int(source), int(source) + 1, axis=axis)
        out = lax.dynamic_update_slice_in_dim(out, part, k, axis=axis)
    return out


def _by_product(a, order, axis):
    chosen = jnp.asarray(np.eye(len(order))[order], a.dtype)
    return jnp.moveaxis(jnp.tensordot(chosen, a, ((1,), (axis,))), 0, axis)


def in_order(name: str, order: np.ndarray, letter: str, *, note: str = "") -> Step:
    """Of rows, positions or both: ``letter`` of a kind."""
    return _moving(
        f"{note}{letter} in the order {order.tolist()} by {name}",
        lambda a, kind: ORDERED[name](a, order, kind.index(letter)),
    )


def rolled(shift: int, letter: str) -> Step:
    return _moving(
        f"roll {letter} by {shift}", lambda a, kind: jnp.roll(a, shift, axis=kind.index(letter))
    )


def flipped(letter: str) -> Step:
    return _moving(f"flip {letter}", lambda a, kind: jnp.flip(a, axis=kind.index(letter)))


def by_data(letter: str, sorting: str) -> Step:
    """In an order that only data know."""

    def run(reading, values, kind):
        axis = kind.index(letter)
        keys = jnp.moveaxis(values.c, axis, 0).reshape(values.c.shape[axis], -1)[:, 0]
        order = jnp.argsort(keys)

        def moved(a):
            a = jnp.moveaxis(a, axis, 0)
            if sorting == "gather":
                a = a[order]
            elif sorting == "scatter":
                a = jnp.zeros_like(a).at[order].set(a)
            elif sorting == "scatter-add":
                a = jnp.zeros_like(a).at[order].add(a)
            elif sorting == "product":
                weights = jax.nn.one_hot(order, a.shape[0], dtype=a.dtype)
                a = jnp.tensordot(weights, a, 1)
            else:
                a = lax.map(lambda k: a[k], order)
            return jnp.moveaxis(a, 0, axis)

        return _each(moved, values), kind

    return Step(f"sort {letter} by data, with {sorting}", run, moves_rows=True)


SORTINGS = ["gather", "scatter", "scatter-add", "product", "loop"]


def there_and_back(inner: Sequence[Step], letter: str, *, twice: bool) -> Step:
    """In an order that only data know, and back; what was there before is added."""

    def run(reading, values, kind):
        if reading.is_row:
            moved, _ = run_steps(reading, inner, values, kind)
            return values._replace(h=moved.h + values.h), kind
        axis = kind.index(letter)
        keys = jnp.moveaxis(values.c, axis, 0).reshape(values.c.shape[axis], -1)[:, 0]
        order = jnp.argsort(keys)
        moved = _each(lambda a: jnp.take(a, order, axis=axis), values)
        moved, _ = run_steps(reading, inner, moved, kind)
        if twice:
            h = jnp.take(moved.h, jnp.argsort(order), axis=axis)
        else:
            h = jnp.moveaxis(moved.h, axis, 0)
            h = jnp.moveaxis(jnp.zeros_like(h).at[order].set(h), 0, axis)
        return values._replace(h=h + values.h), kind

    text = f"sort {letter} by data, run, {'gather' if twice else 'scatter'} back, add:"
    remake = functools.partial(there_and_back, letter=letter, twice=twice)
    return Step(text, run, inner=tuple(inner), remake=remake)


def residual(inner: Sequence[Step]) -> Step:
    def run(reading, values, kind):
        found, after = run_steps(reading, inner, values, kind)
        return found._replace(h=found.h + values.h), after

    return Step("run and add to what was there:", run, inner=tuple(inner), remake=residual)


def called(how: str, inner: Sequence[Step]) -> Step:
    """Through jit, checkpoint, cond or a loop."""

    def run(reading, values, kind):
        def body(values):
            return run_steps(reading, inner, values, kind)[0]

        if how == "jit":
            return jax.jit(body)(values), kind
        if how == "checkpoint":
            return jax.checkpoint(body)(values), kind
        if how == "cond":
            return lax.cond(reading.flag, body, lambda v: v._replace(h=jnp.sin(v.h)), values), kind
        if how == "switch":
            index = jnp.where(reading.flag, 2, 0)
            branches = [lambda v: v, lambda v: v._replace(h=v.h * 2), body]
            return lax.switch(index, branches, values), kind
        if how == "scan":
            return lax.scan(lambda v, _: (body(v), None), values, None, length=2)[0], kind
        if how == "checkpointed scan":
            step = jax.checkpoint(lambda v, _: (body(v), jnp.sum(v.h)))
            return lax.scan(step, values, None, length=2)[0], kind
        return lax.fori_loop(0, 2, lambda _, v: body(v), values), kind

    return Step(f"{how} of:", run, inner=tuple(inner), remake=functools.partial(called, how))


CALLS = ["jit", "checkpoint", "cond", "switch", "scan", "checkpointed scan", "fori_loop"]


def over_rows(how: str, inner: Sequence[Step]) -> Step:
    """Of kind "bt" or "tb": ``inner`` on parts of the rows."""

    def run(reading, values, kind):
        if reading.is_row:
            return run_steps(reading, inner, values, kind)
        axis = kind.index("b")
        first = _each(lambda a: jnp.moveaxis(a, axis, 0), values)
        rows = first.h.shape[0]

        def one(values):
            return run_steps(reading, inner, values, "t")[0]

        def some(values):
            return run_steps(reading, inner, values, "bt")[0]

        if how == "vmap":
            return jax.vmap(one, in_axes=axis, out_axes=axis)(values), kind
        if how == "map":
            out = lax.map(one, first)
        elif how == "map in batches":
            out = lax.map(one, first, batch_size=2)
        elif how == "checkpointed map":
            out = lax.map(jax.checkpoint(one), first)
        elif how == "loop over slices":
            parts = [one(_each(lambda a, k=k: a[k], first)) for k in range(rows)]
            out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        elif how == "loop over chunks":
            parts = [some(_each(lambda a, k=k: a[k : k + 2], first)) for k in range(0, rows, 2)]
            out = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        elif how == "padded":
            wide = [jnp.pad(a, [(0, 2), *((0, 0),) * (a.ndim - 1)]) for a in first[:2]]
            ids = first.ids
            if ids is not None:
                ids = jnp.pad(ids, [(0, 2), (0, 0)], constant_values=-1)
            out = _each(lambda a: a[:rows], some(Values(*wide, ids)))
        elif how == "by index":
            out = lax.map(
                lambda k: one(_each(lambda a: lax.dynamic_index_in_dim(a, k, 0, False), first)),
                jnp.arange(rows),
            )
        elif how == "updates of a carry":

            def body(k, out):
                found = one(_each(lambda a: a[k], first))
                return jax.tree.map(lambda o, own: o.at[k].set(own), out, found)

            out = lax.fori_loop(0, rows, body, _each(jnp.zeros_like, first))
        elif how == "micro-batches":
            parts = _each(lambda a: a.reshape(rows // 2, 2, *a.shape[1:]), first)
            out = lax.scan(lambda _, part: (None, some(part)), None, parts)[1]
            out = _each(lambda a: a.reshape(rows, *a.shape[2:]), out)
        else:  # every k-th row
            parts = _each(
                lambda a: jnp.swapaxes(a.reshape(2, rows // 2, *a.shape[1:]), 0, 1), first
            )
            out = lax.scan(lambda _, part: (None, some(part)), None, parts)[1]
            out = _each(lambda a: jnp.swapaxes(a, 0, 1).reshape(rows, *a.shape[2:]), out)
        return _each(lambda a: jnp.moveaxis(a, 0, axis), out), kind

    remake = functools.partial(over_rows, how)
    return Step(f"over rows, {how}:", run, inner=tuple(inner), remake=remake)


LOOPS = [
    "vmap", "map", "map in batches", "checkpointed map", "loop over slices", "loop over chunks",
    "padded", "by index", "updates of a carry",
]  # fmt: skip
EVEN_LOOPS = ["micro-batches", "every k-th"]  # need an even number of rows
