"""Reading jaxprs, with public names alone."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

# Calls, which are opened as if there were none.
CALLS = frozenset(["call", "closed_call", "jit"])
_RULES = ("custom_jvp_call", "custom_vjp_call")
# Name of the marks on what does not reach the loss.
UNUSED = "ghostjax_unused"
_OWN_FOLDERS = tuple(
    f"{pathlib.Path(file).parent.as_posix()}/" for file in (__file__, jax.__file__)
)
_LIBRARIES = ("chex", "equinox", "flax", "haiku", "jax", "optax")


def is_var(atom: Any) -> bool:
    return isinstance(atom, core.Var)


def value_in(env: Mapping[core.Var, Any], atom: Any, otherwise: Any = None) -> Any:
    """What is known of a variable; ``otherwise`` where nothing is, as of literals."""
    return env.get(atom, otherwise) if is_var(atom) else otherwise


def is_inexact(value: Any) -> bool:
    """Whether gradient can flow through a variable or an array: not through integers and keys."""
    dtype = getattr(getattr(value, "aval", value), "dtype", type(value))
    return jnp.issubdtype(dtype, jnp.inexact)


def inner_jaxprs(eqn: Any) -> list[tuple[core.Jaxpr, int | None]]:
    """The jaxprs an equation runs, each with the operand its first input is.

    None where inputs and operands do not correspond one to one.
    """
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = item.jaxpr if isinstance(item, core.ClosedJaxpr) else item
            if not isinstance(jaxpr, core.Jaxpr):
                continue
            offset = 1 if eqn.primitive.name == "cond" else 0
            matches = len(jaxpr.invars) == len(eqn.invars) - offset
            found.append((jaxpr, offset if matches else None))
    return found


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands, in this order, are constants and carries.

    Told by shapes, as their names among the parameters differ between versions of JAX: what is
    scanned over has one more axis outside the body than inside, and so have stacked outputs.
    """
    ((body, _),) = inner_jaxprs(eqn)

    def passed_whole(outer, inner):
        pairs = zip(outer, inner, strict=True)
        return sum(len(whole.aval.shape) == len(part.aval.shape) for whole, part in pairs)

    carries = passed_whole(eqn.outvars, body.outvars)
    return passed_whole(eqn.invars, body.invars) - carries, carries


def holds(eqn: Any, name: str) -> bool:
    """Whether an equation is, or runs somewhere inside, the primitive of that name."""
    return eqn.primitive.name == name or any(
        holds(inner, name) for jaxpr, _ in inner_jaxprs(eqn) for inner in jaxpr.eqns
    )


def live_equations(jaxpr: core.Jaxpr, live_outputs: list[bool]) -> tuple[list[Any], set[core.Var]]:
    """The equations that the outputs named by ``live_outputs`` need, and the variables they use."""
    live = {var for var, is_live in zip(jaxpr.outvars, live_outputs) if is_live and is_var(var)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in live for var in eqn.outvars):
            needed.append(eqn)
            live.update(var for var in eqn.invars if is_var(var))
    return needed[::-1], live


def stops(eqn: Any) -> bool:
    """Whether no gradient of the loss flows back through an equation, as JAX or a mark says."""
    return eqn.primitive.name == "stop_gradient" or eqn.params.get("name") == UNUSED


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation."""
    params = eqn.primitive.get_bind_params(eqn.params)
    sharding = params.get("out_sharding")
    if isinstance(sharding, NamedSharding):  # JAX's batching rules want an entry for every axis
        rank = len(eqn.outvars[0].aval.shape)
        spec = PartitionSpec(*sharding.spec, *[None] * (rank - len(sharding.spec)))
        params = params | {"out_sharding": sharding.update(spec=spec)}
    if (
        eqn.primitive.name in _RULES
    ):  # what users wrote, and may index as arrays of JAX alone can be
        operands = [jnp.asarray(o) if isinstance(o, np.ndarray) else o for o in operands]
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*operands, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def describe_operation(eqn: Any, around: Sequence[Any] = ()) -> str:
    """The operation and the innermost source line outside the libraries.

    Args:
      around: the calls that the equation is inside of, the innermost first. What a library's own
        jitted function does has no line outside the libraries.
    """
    name = eqn.params["name"] if eqn.primitive.name == "jit" else eqn.primitive.name
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not _is_of_library(frame.file_name.replace("\\", "/")):
            return f"{name} at {frame.file_name}:{frame.line_num}"
    return f"{name} in {describe_operation(around[0], around[1:])}" if around else name


def _is_of_library(path: str) -> bool:
    _, installed, rest = path.rpartition("-packages/")
    return path.startswith((*_OWN_FOLDERS, "<frozen")) or (
        bool(installed) and rest.split("/")[0] in _LIBRARIES
    )
