"""What ``explain`` returns, and how it is printed."""

import dataclasses
import pathlib
from typing import Any

from ghostjax import _norm_costs
from ghostjax._norm_costs import NormCosts
from ghostjax._step_memory import StepMemory, in_units
from ghostjax.core import Route

HEADER = (
    "parameter",
    "meets data in",
    "times",
    "row axis",
    "dots",
    "route",
    "FLOP",
    "late route",
    "late FLOP",
    "late bytes",
)
NUMBERS = frozenset({"times", "FLOP", "late FLOP", "late bytes", "uses", "bytes kept"})


@dataclasses.dataclass(frozen=True)
class Use:
    """One parameter in one operation where it meets data.

    Attributes:
      parameter: its path, as ``jax.tree_util.keystr`` writes it.
      operation: where they meet, and the source line: "dot_general at model.py:12"; a loop or a
        branch where the parameter becomes what it carries or gives; "the loss" if it is that.
      times: how often: the product of the lengths of the loops around it.
      row_axis: which axis of the result holds the B rows: "0", "0 = B x 6" if merged with others,
        "vmap" with ``per_example``, "moved" where rows are followed by their numbers, "-" where
        there is none.
      in_rows: whether the dots of this use belong to rows; if not, they are in ``shared``.
      route: of ``value_grad_and_dots`` to the dots: "tangent", "rows", "features" or "rule", a
        ``Route``.
      flops: FLOPs of that route for all directions, on top of the plain step.
      late_route, late_flops: the same for ``value_and_dots_fn``.
      late_bytes: bytes of the factors that ``value_and_dots_fn`` keeps.

    FLOPs and bytes are those of all ``times``. Where several parameters meet data in one operation
    at once, it is divided among them equally.
    """

    parameter: str
    operation: str
    times: int
    row_axis: str
    in_rows: bool
    route: Route
    flops: int
    late_route: Route
    late_flops: int
    late_bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Where parameters meet data, how their dots are made there, and what that costs.

    Attributes:
      uses: a row per parameter and operation, in the order of the parameters.
      unused: parameters that meet no data.
      num_rows: B.
      directions: K, or None for one direction without a leading axis.
      backend: the one that routes are for.
      plain_flops: FLOPs of ``jax.value_and_grad``.
      push_flops: of pushing the directions through what is made of parameters alone, such as casts.
      uncounted: operations of the plain step whose work shapes do not tell, such as while loops:
        one round of them is in ``plain_flops``.
      norms: a ``NormCosts``: by which route norms of rows' gradients come, and at what cost; or why
        they are refused.
      memory: a ``StepMemory``: bytes on each device, and what is sent.
      budget: bytes that one device has, as given or as it says itself; or None.

    Two things are bounds: of branches that are chosen from at run time, ``plain_flops`` has the
    largest and ``uses`` has all; and what a custom_vjp rule does for the dots counts in full, where
    a compiler may merge it with the backward pass. The FLOPs of the gradient that a direction is
    made of are in no number.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]
    num_rows: int
    directions: int | None
    backend: str
    plain_flops: int
    push_flops: int
    uncounted: tuple[str, ...]
    norms: NormCosts
    memory: StepMemory
    budget: int | None

    @property
    def flops(self) -> int:
        """FLOPs of ``value_grad_and_dots``."""
        return self.plain_flops + self.push_flops + sum(use.flops for use in self.uses)

    @property
    def late_flops(self) -> int:
        """FLOPs of ``value_and_dots_fn`` and of its dots."""
        return self.plain_flops + self.push_flops + sum(use.late_flops for use in self.uses)

    @property
    def cost(self) -> float:
        """FLOPs of ``value_grad_and_dots`` over those of the plain step."""
        return self.flops / max(self.plain_flops, 1)

    @property
    def late_cost(self) -> float:
        """FLOPs of ``value_and_dots_fn`` and its dots over those of the plain step."""
        return self.late_flops / max(self.plain_flops, 1)

    @property
    def late_bytes(self) -> int:
        """Bytes of all factors that ``value_and_dots_fn`` keeps."""
        return sum(use.late_bytes for use in self.uses)

    @property
    def norms_cost(self) -> float | None:
        """FLOPs of ``squared_norms`` over those of the plain step; None where it is refused."""
        return None if self.norms.flops is None else self.norms.flops / max(self.plain_flops, 1)

    @property
    def clipped_cost(self) -> float | None:
        """FLOPs of ``value_and_clipped_grad`` over those of the plain step; None where refused."""
        clipped = self.norms.clipped_flops
        return None if clipped is None else clipped / max(self.plain_flops, 1)

    @property
    def fits(self) -> bool | None:
        """Whether a step of ``value_grad_and_dots`` takes no more than the budget, if there is one.

        Optimizer state is in it where ``explain`` was given the ``optimizer``, with an update in
        place; what else there is on the device is not.
        """
        return None if self.budget is None else self.memory.bytes <= self.budget

    def __str__(self) -> str:
        blocks = [*(_aligned(*table) for table in self._tables()), self._summary()]
        return "\n\n".join("\n".join(lines) for lines in blocks)

    def __rich__(self) -> Any:
        """For ``rich.print``."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        tables = []
        for header, rows in self._tables():
            tables.append(Table())
            for name in header:
                justify = "right" if name in NUMBERS else "left"
                tables[-1].add_column(name, justify=justify, overflow="fold")
            for row in rows:
                tables[-1].add_row(*map(Text, row))  # brackets in names are no markup
        return Group(*tables, *map(Text, self._summary()))

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """Headers and cells."""
        norms = self.norms.cells()
        return [(HEADER, self._cells()), *([(_norm_costs.HEADER, norms)] if norms else [])]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                use.parameter,
                _shortened(use.operation),
                str(use.times),
                use.row_axis,
                "rows" if use.in_rows else "shared",
                use.route,
                in_units(use.flops),
                use.late_route,
                in_units(use.late_flops),
                in_units(use.late_bytes, 1024),
            )
            for use in self.uses
        ]

    def _summary(self) -> list[str]:
        count, factors = self.directions or 1, in_units(self.late_bytes, 1024)
        plain, dots, late = map(in_units, (self.plain_flops, self.flops, self.late_flops))
        lines = [
            f"{self.num_rows} rows, {count} direction{'s' * (count > 1)}, on {self.backend}",
            f"plain step              {plain:>6} FLOP",
            f"value_grad_and_dots     {dots:>6} FLOP, {self.cost:.2f} of the plain step",
            f"value_and_dots_fn       {late:>6} FLOP, {self.late_cost:.2f} of the plain step; "
            f"keeps {factors}B of factors",
        ]
        if self.push_flops:
            lines.append(
                f"of both, {in_units(self.push_flops)} FLOP to move the directions to the data"
            )
        lines += self.norms.lines(self.plain_flops)
        if self.unused:
            lines.append(f"unused: {', '.join(self.unused)}")
        if self.uncounted:
            places = ", ".join(map(_shortened, self.uncounted))
            lines.append(f"counted once, however often they run: {places}")
        return [*lines, *self.memory.lines(self.budget, self.num_rows, count)]


def _aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return [
        "  ".join(
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for name, cell, width in zip(header, row, widths)
        ).rstrip()
        for row in [header, *rows]
    ]


def _shortened(operation: str) -> str:
    """The name of the file without its folders."""
    name, at, place = operation.partition(" at ")
    return f"{name}{at}{pathlib.PurePath(place).name}"
