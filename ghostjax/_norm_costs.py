"""Norms of rows' gradients and clipped gradients: by which route, at what cost, in words."""

import dataclasses

from ghostjax._step_memory import in_bytes, in_units
from ghostjax.core import NormRoute

HEADER = ("norm of", "uses", "route", "FLOP", "bytes kept")


@dataclasses.dataclass(frozen=True)
class Norm:
    """The squared norms of the rows' gradients by one parameter.

    Attributes:
      parameter: its path.
      uses: how often it meets data, loops multiplied out.
      route: a ``NormRoute``. Out of the backward pass come "features" (the gradient of what is
        repeated over rows, made for each), "gram" (a product, over pairs of a row's positions),
        "windows" (a convolution, by what it moves over), "pairs" (a look-up, over pairs of a row's
        positions) and "rows" (one row's gradient at a time). When it is over, "pairs" of several
        uses of a matrix, and "together": gradients of one row after another, put together of all
        uses.
      flops: FLOPs of that route. Where several parameters meet data in one operation, each has all.
      bytes: of the factors that wait until the pass is over; 0 where the norm comes out of it.
    """

    parameter: str
    uses: int
    route: NormRoute
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class NormCosts:
    """What ``squared_norms`` and ``value_and_clipped_grad`` do, and what that costs.

    Attributes:
      parameters: those that have a part of rows, each a ``Norm``.
      flops: FLOPs of ``squared_norms``: a forward and a backward pass in which no gradients of
        parameters are made, and the norms. None where it is refused.
      extra_flops: those of the norms alone, which ``norms=True`` adds to ``value_grad_and_dots``.
      bytes: of all factors that wait.
      clipped_flops: FLOPs of ``value_and_clipped_grad``; None where it is refused.
      refused, clipping_refused: why; empty where they are not.
    """

    parameters: tuple[Norm, ...] = ()
    flops: int | None = None
    extra_flops: int | None = None
    bytes: int | None = None
    clipped_flops: int | None = None
    refused: str = ""
    clipping_refused: str = ""

    def cells(self) -> list[tuple[str, ...]]:
        """Of a table with that header."""
        return [
            (
                norm.parameter,
                str(norm.uses),
                norm.route,
                in_units(norm.flops),
                in_units(norm.bytes, 1024),
            )
            for norm in self.parameters
        ]

    def lines(self, plain_flops: int) -> list[str]:
        """In words."""
        kept = f"; keeps {in_bytes(self.bytes)} of factors" if self.bytes else ""
        no_clipping = self.refused or self.clipping_refused
        lines = [
            _line("squared_norms", self.flops, plain_flops, self.refused) + kept,
            _line("value_and_clipped_grad", self.clipped_flops, plain_flops, no_clipping),
        ]
        if self.extra_flops is not None:
            added = in_units(self.extra_flops)
            lines.append(f"norms=True adds {added} FLOP to value_grad_and_dots")
        return lines


def _line(name: str, flops: int | None, plain_flops: int, refused: str) -> str:
    if flops is None:
        reason, *_ = refused.splitlines()[0].partition(". ")
        return f"{name:<22}  refused: {reason.rstrip(':.')}"
    cost = flops / max(plain_flops, 1)
    return f"{name:<22}  {in_units(flops):>6} FLOP, {cost:.2f} of the plain step"
