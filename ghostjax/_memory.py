"""What a jaxpr needs beside its inputs and outputs: scratch memory, and what a mesh makes it send.

Values live from the equation that makes them to the last that needs them. Elementwise results that
are needed once, and what is only moved, are made where they are needed, as compilers fuse them.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core

from ghostjax._flops import MOVING, is_product
from ghostjax._jaxprs import inner_jaxprs, is_var, live_equations, scan_counts
from ghostjax._placement import COLLECTIVES, Spec, as_spec, local_bytes, placed, whole

_WRITTEN = frozenset(
    """
    concatenate cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice gather pad
    random_bits random_wrap rev scatter sort threefry2x32 top_k
    """.split()  # noqa: SIM905
) | frozenset(COLLECTIVES)
# What compilers do again rather than keep: elementwise operations without functions that take long.
_CHEAP = frozenset(
    """
    add add_any and convert_element_type div eq ge gt integer_pow le lt max min mul ne neg not or
    select_n square sub
    """.split()  # noqa: SIM905
)
_VIEWS = (MOVING - _WRITTEN) | {"convert_element_type"}


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of a jaxpr, on one device.

    Attributes:
      specs: how its outputs are split.
      scratch: bytes, at most at a time, beside inputs and outputs.
      sent: by kind of collective, bytes of the results.
    """

    specs: tuple[Spec, ...]
    scratch: int
    sent: Mapping[str, int]


def needs(jaxpr: core.Jaxpr, specs: Sequence[Spec], sizes: Mapping[str, int]) -> Needs:
    """Of a jaxpr whose inputs are split like ``specs`` over a mesh with axes of these sizes."""
    equations, _ = live_equations(jaxpr, [True] * len(jaxpr.outvars))
    split = {var: whole(var.aval) for var in jaxpr.constvars}
    split.update(zip(jaxpr.invars, specs, strict=True))
    sent: collections.Counter[str] = collections.Counter()
    inside: list[int] = []  # by equation, bytes
    gathered: dict[Any, int] = {}  # by variable and what it is needed for, the copy of all of it
    sources: dict[core.Var, frozenset[core.Var]] = {}
    for eqn in equations:
        own = [split[a] if is_var(a) else whole(a.aval) for a in eqn.invars]
        if _bodies(eqn):
            found = _of_call(eqn, own, sizes)
            outputs, transient = found.specs, found.scratch
            sent.update(found.sent)
        else:
            at = placed(eqn, own, sizes)
            outputs, transient = at.specs, 0
            if eqn.primitive.name not in COLLECTIVES:
                # What a device has of a sum stands beside the sum.
                transient = at.sent.get("all-reduce", 0)
            sent.update(at.sent)
            for k, size in at.gathered.items():
                (source,) = sources.get(eqn.invars[k], {eqn.invars[k]}) or {None}
                copy = source, eqn.primitive.name
                if gathered.setdefault(copy, 0) < size:
                    sent["all-gather"] += size - gathered[copy]
                    gathered[copy] = size
        inside.append(transient)
        split.update(zip(eqn.outvars, outputs, strict=True))
        if eqn.primitive.name in _VIEWS and eqn.invars and is_var(eqn.invars[0]):
            origin = sources.get(eqn.invars[0], frozenset([eqn.invars[0]]))
            sources.update((var, origin) for var in eqn.outvars)
    outputs = [split[var] if is_var(var) else whole(var.aval) for var in jaxpr.outvars]
    bytes_of = {var: local_bytes(var.aval, spec, sizes) for var, spec in split.items()}
    scratch = _peak(jaxpr, equations, bytes_of, inside) + sum(gathered.values())
    return Needs(tuple(outputs), scratch, sent)


def _peak(jaxpr, equations, bytes_of: dict[Any, int], inside: Sequence[int]) -> int:
    """The largest sum of what lives at a time."""
    uses: dict[Any, list[int]] = collections.defaultdict(list)
    for number, eqn in enumerate(equations):
        for atom in filter(is_var, eqn.invars):
            uses[atom].append(number)
    results = set(filter(is_var, jaxpr.outvars))
    kinds = [_kind(eqn) for eqn in equations]
    roots: dict[Any, frozenset[Any]] = {}
    born: dict[Any, int] = {}
    last: dict[Any, int] = {}
    for number, (eqn, kind) in enumerate(zip(equations, kinds)):
        same, cheap = _made_again(eqn) if eqn.primitive.name == "shard_map" else ({}, {})
        reached = frozenset().union(
            *(roots.get(a, frozenset([a])) for a in eqn.invars if is_var(a))
        )
        last.update(dict.fromkeys(reached, number))
        for var in eqn.outvars:
            is_fused = kind == "view" or (
                kind == "elementwise"
                and len(uses[var]) <= 1
                and all(kinds[use] != "written" for use in uses[var])
            )
            if var in results:
                continue
            if var in same or (var in cheap and len(uses[var]) <= 1):
                own = same[var] if var in same else cheap[var]
                roots[var] = frozenset().union(*(roots.get(a, frozenset([a])) for a in own))
            elif is_fused:
                roots[var] = reached
            else:
                born[var] = number
                last.setdefault(var, number)
    ends: dict[int, list[Any]] = collections.defaultdict(list)
    for var in born:
        ends[last[var]].append(var)
    live = peak = 0
    for number, (eqn, kind) in enumerate(zip(equations, kinds)):
        new = sum(bytes_of[var] for var in eqn.outvars if var in born)
        ending = sum(bytes_of[var] for var in ends[number] if born[var] < number)
        in_place = min(new, ending) if kind == "elementwise" else 0
        peak = max(peak, live + new - in_place + inside[number])
        live += new - sum(bytes_of[var] for var in ends[number])
    return peak


def _made_again(eqn) -> tuple[dict[Any, list[Any]], dict[Any, list[Any]]]:
    """Results of a ``shard_map`` that other variables hold: those that are another result or an
    operand, in another shape; and those that cheap operations make of these, as compilers do where
    they are needed."""
    ((body, _),) = _bodies(eqn)
    made = {var: own for own in body.eqns for var in own.outvars}
    held = dict(zip(body.invars, eqn.invars))
    same: dict[Any, list[Any]] = {}

    def origin(var):
        while var in made and _kind(made[var]) == "view" and is_var(made[var].invars[0]):
            var = made[var].invars[0]
        return var

    pairs = [(origin(var), own) for var, own in zip(body.outvars, eqn.outvars) if is_var(var)]
    for var, own in pairs:
        if held.setdefault(var, own) is not own:
            same[own] = [atom for atom in [held[var]] if is_var(atom)]

    # By variable, what holds it or what it is made of again. In the order of the body, as a walk
    # back from a result goes through what is used twice twice, and again behind it.
    known = {var: {atom: None} if is_var(atom) else {} for var, atom in held.items()}
    remade: dict[Any, dict[Any, None]] = {}
    for own in body.eqns:
        if own.primitive.name not in _CHEAP:
            continue
        operands = [origin(atom) for atom in own.invars if is_var(atom)]
        found = [known.get(var, remade.get(var)) for var in operands]
        if None not in found:
            again = {atom: None for atoms in found for atom in atoms}
            remade.update((var, again) for var in own.outvars)
    cheap = {own: remade.get(var) for var, own in pairs if own not in same}
    return same, {own: list(found) for own, found in cheap.items() if found is not None}


def _kind(eqn) -> str:
    name = eqn.primitive.name
    if name in _VIEWS:
        return "view"
    is_written = is_product(eqn) or name in _WRITTEN or _bodies(eqn)
    if is_written or name.startswith(("scatter", "reduce_window", "select_and")):
        return "written"
    return "reduction" if name.startswith(("reduce", "arg")) else "elementwise"


def _bodies(eqn) -> list[tuple[core.Jaxpr, int | None]]:
    """The jaxprs that an equation runs, but for the sum of two numbers that it has of its own."""
    has_sum = eqn.primitive.name.startswith(("scatter", "reduce", "select_and"))
    return [] if has_sum else inner_jaxprs(eqn)


def _of_call(eqn, specs: Sequence[Spec], sizes) -> Needs:
    """Of an equation that runs other jaxprs."""
    name = eqn.primitive.name
    bodies = _bodies(eqn)
    if name == "scan":
        return _of_scan(eqn, bodies[0][0], specs, sizes)
    if name == "shard_map":
        return _of_shard_map(eqn, bodies[0][0], specs, sizes)
    found = [
        needs(
            jaxpr,
            [whole(v.aval) for v in jaxpr.invars] if offset is None else specs[offset:],
            sizes,
        )
        for jaxpr, offset in bodies
    ]
    scratch = max(own.scratch for own in found)
    outputs = tuple(
        next(
            (own.specs[k] for own in found if _fits(own.specs, eqn.outvars)),
            whole(var.aval),
        )
        for k, var in enumerate(eqn.outvars)
    )
    sent = max((own.sent for own in found), key=lambda own: sum(own.values()))
    return Needs(outputs, scratch, sent)


def _fits(specs, outvars) -> bool:
    ranks = [len(getattr(var.aval, "shape", ())) for var in outvars]
    return [len(spec) for spec in specs] == ranks


def _of_shard_map(eqn, body, specs: Sequence[Spec], sizes) -> Needs:
    """Inside, shapes are those of one device along the manual axes of the mesh; others split on."""
    known, sizes = sizes, {**eqn.params["mesh"].shape, **sizes}
    manual = frozenset(eqn.params["newly_manual_axes"])
    inside, copies = [], 0
    for var, spec, own in zip(body.invars, specs, eqn.params["in_specs"], strict=True):
        inside.append(tuple(tuple(n for n in names if n not in manual) for names in spec))
        given = as_spec(own, len(spec))
        lost = (manual.intersection(names).difference(of) for names, of in zip(spec, given))
        if any(lost):
            copies += local_bytes(var.aval, inside[-1], sizes)
    found = needs(body, inside, sizes)
    outputs = tuple(
        tuple(
            tuple(name for name in (*before, *after) if name in known)
            for before, after in zip(as_spec(own, len(spec)), spec)
        )
        for own, spec in zip(eqn.params["out_specs"], found.specs, strict=True)
    )
    sent = collections.Counter(found.sent)
    if copies:
        sent["all-gather"] += copies
    return Needs(outputs, found.scratch + copies, sent)


def _of_scan(eqn, body, specs, sizes) -> Needs:
    consts, carries = scan_counts(eqn)
    each = [spec[1:] for spec in specs[consts + carries :]]
    carried = list(specs[consts : consts + carries])
    for _ in range(2):  # what begins as zeros is split as it comes out
        found = needs(body, [*specs[:consts], *carried, *each], sizes)
        carried = [
            after if not any(before) else before for before, after in zip(carried, found.specs)
        ]
    stacked = [((), *spec) for spec in found.specs[carries:]]
    sent = {kind: eqn.params["length"] * size for kind, size in found.sent.items()}
    # The carry of the next round beside that of this one.
    again = sum(local_bytes(var.aval, spec, sizes) for var, spec in zip(body.outvars, carried))
    return Needs((*carried, *stacked), found.scratch + again, sent)
