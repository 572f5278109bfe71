"""Random programs by seed, and their three readings."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz import layouts, places, rows
from tests.fuzz.state import Reading, Sizes, Step, Values, run_steps

# With B = T = F no axis is told by its size.
SIZES = [Sizes(4, 4, 4), Sizes(4, 3, 2), Sizes(2, 4, 3), Sizes(3, 3, 2), Sizes(4, 2, 2)]
# How the losses of places [*lead] become one number.
ENDS = ["all", "rows", "weighted", "masked", "in a loop", "dot", "log-sum-exp"]


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes:
    family: "rows": rows stay apart, wherever they are moved; "positions": so do uses by position;
      "mixed": rows are mixed somewhere.
    """

    seed: int
    family: str
    sizes: Sizes
    reduction: str
    end: str
    steps: tuple[Step, ...]

    def text(self) -> str:
        head = f"seed {self.seed}: {self.family}, {self.sizes}"
        last = f"{self.reduction} of losses: {self.end}"
        return "\n".join([head, *(line for step in self.steps for line in step.lines("  ")), last])

    def arrays(self) -> tuple[dict[str, Any], Any, Any]:
        """Parameters, batch and flag, in float64."""
        rng, (b, t, f) = np.random.default_rng([self.seed, 1]), dataclasses.astuple(self.sizes)
        shapes = {
            "w": (f, f),
            "u": (f, f),
            "b": (f,),
            "s": (),
            "table": (5, f),
            "positions": (t, f),
        }
        params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        batch = {"x": jnp.asarray(rng.normal(size=(b, t, f)))}
        batch["c"] = jnp.asarray(rng.normal(size=(b, t, 2)))
        return params, batch, jnp.asarray(rng.integers(2) == 0)

    def directions(self, count: int = 2) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 2])
        params = self.arrays()[0]
        return {k: jnp.asarray(rng.normal(size=(count, *p.shape))) for k, p in params.items()}

    def loss(self, params, batch, flag):
        return self._loss(Reading(self.sizes, params, flag), Values(batch["x"], batch["c"]))

    def row_loss(self, params, row, flag):
        """Of {"x": [T, F], "c": [T, 2]}."""
        reading = Reading(self.sizes, params, flag, is_row=True)
        values, _ = run_steps(reading, self.steps, Values(row["x"], row["c"]), "t")
        losses = _of_places(reading, values)
        if self.end == "log-sum-exp":
            return jax.nn.logsumexp(losses)
        return jnp.mean(losses)

    def moved_loss(self, steps, params, batch, flag, direction):
        """The loss when every row, or place, moves along the direction by a step of its own."""
        reading = Reading(self.sizes, params, flag, direction=direction, steps=steps)
        ids = jnp.arange(self.sizes.b * self.sizes.t).reshape(self.sizes.b, self.sizes.t)
        return self._loss(reading, Values(batch["x"], batch["c"], ids))

    def _loss(self, reading: Reading, values: Values):
        values, kind = run_steps(reading, self.steps, values, "bt")
        losses = _of_places(reading, values)
        count = self.sizes.b if self.reduction == "mean" else 1
        whole = count * self.sizes.t
        if self.end == "rows":
            by_row = jnp.mean(losses, axis=kind.index("t"))
            return jnp.mean(by_row) if self.reduction == "mean" else jnp.sum(by_row)
        if self.end == "log-sum-exp":
            return jnp.sum(jax.nn.logsumexp(losses, axis=kind.index("t"))) / count
        if self.end == "weighted":
            weights = 1 + jnp.square(values.c[..., 0])  # that follow the rows, and cancel
            return jnp.sum(losses / weights * weights) / whole
        if self.end == "masked":
            wide = jnp.pad(losses, [(0, 1), *((0, 0),) * (losses.ndim - 1)])
            here = jnp.arange(wide.shape[0]) < losses.shape[0]
            here = jnp.expand_dims(here, range(1, wide.ndim))
            return jnp.sum(jnp.where(here, wide, 0.0)) / whole
        if self.end == "in a loop":
            return lax.scan(lambda total, own: (total + jnp.sum(own), None), 0.0, losses)[0] / whole
        if self.end == "dot":
            return jnp.vdot(jnp.ones_like(losses), losses) / whole
        return jnp.sum(losses) / whole


def _of_places(reading, values):
    def losses(p, h, c):
        return jnp.sum(jnp.square(h - c[..., :1]), axis=-1) + jnp.sin(c[..., 1] * h[..., 0])

    return reading.use(losses, values, values.c)


class _Draw:
    """Draws steps, and knows of what kind the values are after them."""

    def __init__(self, rng, family: str, sizes: Sizes, reduction: str):
        self.rng, self.family, self.sizes, self.reduction = rng, family, sizes, reduction
        self.kind = "bt"
        self.undo: list[Step] = []  # brings places back into rows

    @property
    def is_whole(self) -> bool:
        """Whether rows are together along an axis of their own."""
        return "t" in self.kind and not self.undo

    def one_of(self, group):
        return group[self.rng.integers(len(group))]

    def inner(self, count: int, kind: str | None = None) -> list[Step]:
        """Steps that leave the layout as it is."""
        before, self.kind = self.kind, kind or self.kind
        steps = []
        for _ in range(count):
            if self.is_whole and self.rng.integers(3) == 0:
                steps.append(rows.draw_row(self.rng, lenient=self.family == "positions"))
            else:
                steps.append(places.draw_place(self.rng))
        self.kind = before
        return steps

    def few(self) -> int:
        return int(self.rng.integers(1, 3))

    def step(self) -> list[Step]:
        choice = self.rng.integers(12)
        if choice < 4:
            return self.inner(1)
        if choice < 6 and self.is_whole:
            return [rows.draw_row(self.rng, lenient=self.family == "positions")]
        if choice == 6:
            return [layouts.called(self.one_of(layouts.CALLS), self.inner(self.few()))]
        if choice == 7 and self.is_whole:
            loops = layouts.LOOPS + (layouts.EVEN_LOOPS if self.sizes.b % 2 == 0 else [])
            how = self.one_of(loops)
            return [layouts.over_rows(how, self.inner(self.few(), "bt"))]
        if choice == 8:
            inner = self.inner(self.few())
            if self.rng.integers(2) or self.undo:
                return [layouts.residual(inner)]
            letter = "n" if self.kind == "n" else "b"
            inner = inner if letter == "b" else [places.draw_place(self.rng)]
            return [layouts.there_and_back(inner, letter, twice=bool(self.rng.integers(2)))]
        if choice == 9 and self.reduction == "sum" and self.family == "rows":
            return [places.CLIPPED]
        return self.moves()

    def moves(self) -> list[Step]:
        if self.undo:
            return [self.undo.pop()] if self.rng.integers(2) else self.inner(1)
        if self.kind == "n":
            return self.moves_of_places()
        choice = self.rng.integers(7)
        if choice == 0:
            self.kind = layouts.SWAPPED[self.kind]
            return [layouts.SWAP]
        if choice == 1:
            self.before, self.kind = self.kind, "n"
            return [layouts.MERGE]
        return [self.move_of_rows()]

    def move_of_rows(self) -> Step:
        choice = self.rng.integers(6)
        if choice == 0:
            return layouts.rolled(int(self.rng.integers(1, self.sizes.b)), "b")
        if choice == 1:
            return layouts.flipped("b")
        if choice == 2 and self.family == "positions":
            return layouts.flipped("t")
        if choice < 4:
            order = self.rng.permutation(self.sizes.b)
            return layouts.in_order(self.one_of([*layouts.ORDERED]), order, "b")
        return layouts.by_data("b", self.one_of(layouts.SORTINGS))

    def moves_of_places(self) -> list[Step]:
        """Of merged rows and positions."""
        choice = self.rng.integers(6)
        sizes = {"b": self.sizes.b, "t": self.sizes.t}
        right = tuple(sizes[letter] for letter in self.before)
        if choice < 2:
            self.kind = self.before
            return [layouts.split(right, self.kind)]
        if choice == 2:  # and rows lie across both axes
            other = layouts.SWAPPED[self.before]
            steps = [layouts.split(tuple(sizes[letter] for letter in other), other), layouts.SWAP]
            return [*steps, layouts.MERGE, *self.inner_of_places(), *self.brought_back(other)]
        order = self.rng.permutation(self.sizes.b * self.sizes.t)
        names = [*layouts.ORDERED]
        self.undo.append(
            layouts.in_order(self.one_of(names), np.argsort(order), "n", note="back: ")
        )
        return [layouts.in_order(self.one_of(names), order, "n")]

    def inner_of_places(self) -> list[Step]:
        return [places.draw_place(self.rng) for _ in range(self.few())]

    def brought_back(self, other: str) -> list[Step]:
        sizes = {"b": self.sizes.b, "t": self.sizes.t}
        swapped = tuple(sizes[letter] for letter in layouts.SWAPPED[other])
        return [layouts.split(swapped, layouts.SWAPPED[other]), layouts.SWAP, layouts.MERGE]

    def mixing(self) -> Step:
        """Rows of their own, plus rows that come from elsewhere; or statistics of the batch."""
        letter = "n" if self.kind == "n" else "b"
        count = self.sizes.b * (self.sizes.t if letter == "n" else 1)
        choice = self.rng.integers(5)
        if choice == 0:
            return _statistics(letter)
        if choice == 1:
            return layouts.residual([layouts.rolled(1, letter)])
        if choice == 2:
            return layouts.residual([layouts.by_data(letter, self.one_of(layouts.SORTINGS))])
        if choice == 3:
            return _running_total(letter)
        order = np.roll(self.rng.permutation(count), 1)
        return layouts.residual([layouts.in_order(self.one_of([*layouts.ORDERED]), order, letter)])


def _statistics(letter: str) -> Step:
    def run(reading, values, kind):
        axis = kind.index(letter)
        h = values.h - 0.5 * jnp.mean(values.h, axis=axis, keepdims=True)
        return values._replace(h=h), kind

    return Step(f"minus half the mean over {letter}", run)


def _running_total(letter: str) -> Step:
    def run(reading, values, kind):
        return values._replace(h=jnp.cumsum(values.h, axis=kind.index(letter))), kind

    return Step(f"running total over {letter}", run)


def family_of(seed: int) -> str:
    """Of ten programs six keep rows apart, and two are of each other family."""
    return [*("rows",) * 6, *("positions",) * 2, *("mixed",) * 2][seed % 10]


@functools.cache
def program(seed: int) -> Program:
    """The program of a seed: two to ten steps."""
    rng, family = np.random.default_rng([seed, 0]), family_of(seed)
    sizes = SIZES[rng.integers(len(SIZES))]
    reduction = "mean" if rng.integers(2) else "sum"
    draw = _Draw(rng, family, sizes, reduction)
    length = int(rng.integers(2, 11))
    mixes_at = int(rng.integers(length)) if family == "mixed" else -1
    steps: list[Step] = []
    while len(steps) < length:
        if 0 <= mixes_at <= len(steps):
            steps.append(draw.mixing())
            mixes_at = -1
        else:
            steps += draw.step()
    if rng.integers(2):
        steps += draw.undo
        draw.undo = []
    ends = [end for end in ENDS if draw.is_whole or end not in ("rows", "log-sum-exp")]
    end = str(rng.choice(ends))
    return Program(seed, family, sizes, reduction, end, tuple(steps))
