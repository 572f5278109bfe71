"""What a random program runs on, in three readings.

A program is a list of steps on values [*lead, F] whose leading axes are those of a layout: "bt" and
"tb" (rows and positions), "n" (both merged) and "t" (of a single row). It can be read as

plain    the loss of a batch, as a user would write it
row      the loss of one row, without any of the steps that only move rows: for per-row autodiff
shares   the loss of a batch in which every place has parameters of its own, p + steps[place] * v;
         the derivatives with respect to these steps are what each place, or row, contributes

and the two last know nothing of ghostjax.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]


class Values(NamedTuple):
    """Attributes:
    h: [*lead, F], what parameters act on.
    c: [*lead, 2], data that stay beside it.
    ids: [*lead], the place b * T + t that every entry comes from (-1: nobody's); None but for
      shares.
    """

    h: Any
    c: Any
    ids: Any = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    b: int
    t: int
    f: int


@dataclasses.dataclass
class Reading:
    """How steps are to be read.

    Attributes:
      steps: by parameter [B] or [B * T], for shares; else None.
      flag: a boolean array, which neither batch nor parameters have an influence on.
    """

    sizes: Sizes
    params: Params
    flag: Any
    is_row: bool = False
    direction: Params | None = None
    steps: Params | None = None

    def use(self, function: Callable[..., Any], values: Values, *data: Any) -> Any:
        """``function(params, h, *data)``, which acts on every place [F] by itself."""
        if self.steps is None:
            return function(self.params, values.h, *data)
        lead = values.ids.shape
        count = math.prod(lead)

        def one(steps, h, *data):
            return function(self._moved(steps), h, *data)

        arrays = [a.reshape(count, *a.shape[len(lead) :]) for a in (values.h, *data)]
        out = jax.vmap(one)(self._steps_at(values.ids.reshape(count)), *arrays)
        return out.reshape(*lead, *out.shape[1:])

    def use_by_row(self, function: Callable[..., Any], values: Values, kind: str) -> Any:
        """``function(params, h, c, axis)``, which acts on every row, with its positions at axis."""
        if self.steps is None:
            return function(self.params, values.h, values.c, kind.index("t"))

        def one(steps, h, c):
            return function(self._moved(steps), h, c, 0)

        if kind == "t":
            return one(self._steps_at(values.ids[0]), values.h, values.c)
        rows = kind.index("b")
        steps = self._steps_at(jnp.moveaxis(values.ids, rows, 0)[:, 0])
        return jax.vmap(one, in_axes=(0, rows, rows), out_axes=rows)(steps, values.h, values.c)

    def _moved(self, steps):
        return {
            name: leaf + steps[name] * self.direction[name] for name, leaf in self.params.items()
        }

    def _steps_at(self, ids):
        def at(steps):
            own = ids // self.sizes.t if steps.shape[0] == self.sizes.b else ids
            return jnp.where(ids < 0, 0.0, steps[jnp.maximum(own, 0)])

        return {name: at(steps) for name, steps in self.steps.items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a program.

    Attributes:
      text: a line that says what it does.
      run: ``run(reading, values, kind) -> (values, kind)``.
      moves_rows: for a single row it does nothing.
      inner: the steps that it runs.
      remake: the same step with other inner ones.
    """

    text: str
    run: Callable[[Reading, Values, str], tuple[Values, str]]
    moves_rows: bool = False
    inner: tuple["Step", ...] = ()
    remake: Callable[[Sequence["Step"]], "Step"] | None = None

    def lines(self, indent: str = "") -> list[str]:
        found = [indent + self.text]
        for step in self.inner:
            found += step.lines(indent + "    ")
        return found


def run_steps(reading: Reading, steps: Sequence[Step], values: Values, kind: str):
    for step in steps:
        if not (step.moves_rows and reading.is_row):
            values, kind = step.run(reading, values, kind)
    return values, kind


def expanded(leaf, h):
    """A parameter with leading axes of size 1."""
    return jnp.expand_dims(leaf, range(h.ndim - leaf.ndim))


def repeated(leaf, h):
    return jnp.broadcast_to(leaf, h.shape)
