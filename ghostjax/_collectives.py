"""What devices tell each other in a compiled program, read from its HLO."""

import dataclasses
import math
import re

import jax

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
# `%name = f32[8,4]{1,0} all-reduce(...)`; several results are a tuple, and asynchronous ones start.
_CALL = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program, on one device.

    Attributes:
      kind: as HLO names it: all-reduce, all-gather, all-to-all, reduce-scatter, collective-permute.
      shapes: of its results.
      bytes: that its results take.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """The collectives of a compiled program: what a mesh of devices makes it send.

    Args:
      compiled: ``jax.jit(fn).lower(*args).compile()``.

    Returns:
      A list of ``Collective``, in the program's order. One inside a loop is in it once.

    >>> import jax, jax.numpy as jnp
    >>> collectives(jax.jit(jnp.sum).lower(jnp.ones(4)).compile())
    []
    """
    found = []
    for results, kind, start in _CALL.findall(compiled.as_text()):
        arrays = _ARRAY.findall(results)
        if start and kind != "all-reduce":  # operands come first in the tuple of these
            arrays = arrays[len(arrays) // 2 :]
        shapes = [tuple(int(size) for size in sizes.split(",") if size) for _, sizes in arrays]
        sizes = [_itemsize(name) * math.prod(shape) for (name, _), shape in zip(arrays, shapes)]
        found.append(Collective(kind, tuple(shapes), int(sum(sizes))))
    return found


def _itemsize(name: str) -> float:
    """Bytes of an element: 4 of f32, 2 of bf16, 1 of f8e4m3fn and pred."""
    bits = re.search(r"\d+", name)
    return int(bits[0]) / 8 if bits else 1
