"""The memory of a step, in numbers and in words."""

import dataclasses
import math

FORMS = ("value_grad_and_dots", "value_and_dots_fn")


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device, and what devices send.

    Attributes:
      mesh: the sizes of its axes, by name; empty without one.
      parameters, data: of the arguments: the parameters, and all others.
      optimizer: of its state, where ``explain`` was given one.
      direction, gradient: like the parameters; with K directions, K times.
      plain_scratch, scratch, late_scratch: estimates of what ``jax.value_and_grad``,
        ``value_grad_and_dots``, and ``value_and_dots_fn`` with its dots, need beside these.
      sent, late_sent: by kind of collective, the bytes of results that the latter two add to the
        former.
      whole: axes of the mesh along which no parameter is split.

    Arguments, direction and gradient are exact. Scratch is what lives at a time, if elementwise
    operations are fused: within a factor of 1.5 of what XLA's compiler for CPUs says of a
    transformer's step with dots, on one device and on meshes (``benchmarks/explained_memory.py``),
    and of small models inside of ``shard_map``.
    What is sent is what partitioners do by the letter; they may find something else cheaper.
    """

    mesh: dict[str, int]
    parameters: int
    optimizer: int
    data: int
    direction: int
    gradient: int
    plain_scratch: int
    scratch: int
    late_scratch: int
    sent: dict[str, int]
    late_sent: dict[str, int]
    whole: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """What a step of ``value_grad_and_dots`` takes."""
        return self.fixed + self.data + self.scratch

    @property
    def late_bytes(self) -> int:
        """What a step of ``value_and_dots_fn`` takes."""
        return self.fixed + self.data + self.late_scratch

    @property
    def fixed(self) -> int:
        """What does not depend on the number of rows."""
        return self.parameters + self.optimizer + self.direction + self.gradient

    def lines(self, budget: int | None, num_rows: int, directions: int) -> list[str]:
        """In words; and what to change where a device has less than a step takes."""
        axes = ", ".join(f"{name} {count}" for name, count in self.mesh.items())
        parts = {
            "parameters": self.parameters,
            "optimizer state": self.optimizer,
            "data": self.data,
            "direction": self.direction,
            "gradient": self.gradient,
        }
        if not self.optimizer:
            del parts["optimizer state"]
        found = [
            f"memory{f' on each device of the mesh ({axes})' if axes else ''}: "
            + ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items()),
            f"and about {in_bytes(self.scratch)} in value_grad_and_dots or "
            f"{in_bytes(self.late_scratch)} in value_and_dots_fn, "
            f"{in_bytes(self.plain_scratch)} in the plain step",
        ]
        if self.mesh:
            for name, sent in zip(FORMS, (self.sent, self.late_sent)):
                added = ", ".join(f"{in_bytes(size)} of {kind}" for kind, size in sent.items())
                found.append(f"{name} sends {added or 'nothing'} beside the plain step")
        if budget is None or max(self.bytes, self.late_bytes) <= budget:
            return found
        if self.bytes <= budget:
            return [
                *found,
                f"{FORMS[1]} does not fit into {in_bytes(budget)}, it needs "
                f"{in_bytes(self.late_bytes)}: take {FORMS[0]}, or remat=True",
            ]
        return [
            *found,
            f"{FORMS[0]} does not fit into {in_bytes(budget)}, it needs {in_bytes(self.bytes)}:",
            *(f"  {way}" for way in self._ways_out(budget, num_rows, directions)),
        ]

    def _ways_out(self, budget: int, num_rows: int, directions: int) -> list[str]:
        found, left = [], budget - self.fixed
        parts = math.ceil((self.data + self.scratch) / left) if left > 0 else num_rows + 1
        if parts <= num_rows:
            found.append(
                f"take the batch in {parts} parts, of {num_rows // parts} of the {num_rows} rows, "
                "one after the other (jax.lax.scan)"
            )
        if self.whole:
            names = " and ".join(map(repr, self.whole))
            found.append(f"split parameters along {names} of the mesh, as FSDP does")
        if directions > 1:
            each = in_bytes(self.direction // directions)
            found.append(f"take fewer directions at a time, each is {each}")
        return found or ["split the parameters over more devices, or keep them in a narrower dtype"]


def in_bytes(size: int) -> str:
    return f"{in_units(size, 1024)}B"


def in_units(amount: int, base: int = 1000) -> str:
    """Three digits and a unit: 1.23 G, or with a base of 1024 1.15 Gi."""
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    size, power = float(amount), 0
    while size >= 999.5 and power < len(prefixes) - 1:
        size, power = size / base, power + 1
    digits = 0 if not power or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {prefixes[power]}"
