"""Tasks: how each parameter's dots come out of the backward pass.

A parameter's *taps* are zeros that ride in its box, one for each call; the channel at the call
decides what cotangent its tap gets, and the dots are made of those. Three kinds:

    Contracted   one call, run once (per slice of a scanned parameter): the dots themselves
    Factored     several calls, each run once: their records, contracted together afterwards
    PerRow       calls run many times over the same parameter: per-row gradients, which add up
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ghostjax.linen._boxes import insert_lifted, lifted_to_front, remove_lifted
from ghostjax.linen._plan import Plan, Unit
from ghostjax.linen._records import (
    Factors,
    Lookup,
    Record,
    RowGradients,
    accumulation_dtype,
    contract,
)


class Source(Protocol):
    """What one call can say of one parameter, in the backward pass."""

    def dots(self) -> jax.Array: ...  # [B]

    def record(self) -> Record: ...  # N rows

    def per_row(self) -> jax.Array: ...  # [N, *p]


@dataclasses.dataclass(frozen=True)
class Task:
    """Base, and the task of a parameter that no call uses: its gradient and dots are zero."""

    shape: tuple[int, ...]
    dtype: Any
    num_train: int

    def taps(self) -> dict[int, Any]:
        """Zeros, per call, in the shape they have outside all transforms."""
        return {}

    def cotangent(self, source: Source) -> Any:
        """The cotangent of the call's tap, in the shape it has inside all transforms."""
        raise NotImplementedError

    def dots(self, cotangents: dict[int, Any]) -> jax.Array:
        """The dots [B], from the taps' cotangents."""
        return jnp.zeros(self.num_train, self.dtype)


@dataclasses.dataclass(frozen=True)
class Contracted(Task):
    frame: int
    lifted: tuple

    def taps(self):
        inner = remove_lifted(self.shape, self.lifted)
        shape = insert_lifted((1,) * len(inner) + (self.num_train,), self.lifted)
        return {self.frame: jnp.zeros(shape, self.dtype)}

    def cotangent(self, source):
        rank = len(self.shape) - len(self.lifted)
        return source.dots().reshape((1,) * rank + (self.num_train,))

    def dots(self, cotangents):
        return jnp.sum(cotangents[self.frame].reshape(-1, self.num_train), axis=0)


@dataclasses.dataclass(frozen=True)
class Factored(Task):
    records: dict[int, Record]  # per call, with shapes in place of arrays
    lifted: tuple

    def taps(self):
        def zeros(leaf):
            return jnp.zeros(insert_lifted(leaf.shape, self.lifted), leaf.dtype)

        return jax.tree.map(zeros, self.records)

    def cotangent(self, source):
        return _as_cotangent(source.record())

    def dots(self, cotangents):
        slices = jax.tree.map(lambda leaf: lifted_to_front(leaf, self.lifted), cotangents)
        dots = jax.vmap(lambda records: contract(list(records.values()), self.num_train))(slices)
        return jnp.sum(dots, axis=0)


@dataclasses.dataclass(frozen=True)
class PerRow(Task):
    frames: tuple[int, ...]
    num_rows: int

    def taps(self):
        # The rows come last, so that an axis counted from the front is the parameter's own.
        zeros = jnp.zeros((*self.shape, self.num_rows), self.dtype)
        return dict.fromkeys(self.frames, zeros)

    def cotangent(self, source):
        return jnp.moveaxis(source.per_row(), 0, -1)

    def dots(self, cotangents):
        rows = jnp.moveaxis(sum(cotangents.values()), -1, 0)
        return contract([RowGradients(rows)], self.num_train)


def _as_cotangent(record: Record) -> Record:
    """Cotangents are floating point, so ids travel as exact float32 integers."""
    if isinstance(record, Lookup):
        return dataclasses.replace(record, ids=record.ids.astype(jnp.float32))
    return record


def make_tasks(plan: Plan, params: dict[str, jax.Array], num_rows: int, num_train: int):
    """The task of every parameter, by path."""
    return {
        path: _make_task(plan, path, value, num_rows, num_train) for path, value in params.items()
    }


def _make_task(plan: Plan, path: str, value: jax.Array, num_rows: int, num_train: int) -> Task:
    base = (value.shape, accumulation_dtype(value), num_train)
    units = [plan.units[index] for index in plan.sites[path]]
    if not units:
        return Task(*base)
    indices = tuple(unit.frame.index for unit in units)
    views = {unit.frame.boxes[path] for unit in units}
    lifted = {view.lifted for view in views}
    # A user's own scan or vmap over stacked parameters takes axes off without saying so.
    as_expected = all(remove_lifted(value.shape, view.lifted) == view.shape for view in views)
    if not plan.repeated[path] and len(lifted) == 1 and as_expected:
        if len(units) == 1:
            return Contracted(*base, indices[0], lifted.pop())
        records = {unit.frame.index: _record_shapes(unit, path) for unit in units}
        if all(isinstance(record, (Factors, Lookup)) for record in records.values()):
            return Factored(*base, records, lifted.pop())
    return PerRow(*base, indices, num_rows)


def _record_shapes(unit: Unit, path: str) -> Record | None:
    """The record of one call in shapes, None where the rule has none."""
    if unit.rule is None:
        return None

    def record(inputs, cotangents):
        records = unit.rule(inputs, cotangents, unit.input_axes[0], unit.output_axes[0])
        found = records.get(unit.frame.names.get(path))
        return None if found is None else _as_cotangent(found)

    return jax.eval_shape(record, unit.frame.args[0], unit.frame.outputs[0])
