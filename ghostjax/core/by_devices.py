"""Two ways to the same numbers: one for a program of one device, one for programs of several.

Which it is, is known when a program is lowered: while it is traced, arrays that only
``in_shardings`` of ``jax.jit`` will place are like those of one device. So both ways are kept, and
lowered is one. Of ordinary operations, it can be written down by ``jax.export`` and is found in the
cache of compiled programs, which what asks Python while XLA compiles (``custom_partitioning``) is
not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import AxisType


def by_devices(
    one: Callable[..., list[jax.Array]],
    several: Callable[..., list[jax.Array]],
    arrays: Sequence[Any],
) -> list[jax.Array]:
    """``one(*arrays)`` in a program of one device; in one of n, ``several(n, *arrays)``.

    Neither may close over traced values. Derivatives are those of ``one``.
    """
    jaxpr = jax.make_jaxpr(one)(*arrays)

    def either(*arrays):
        # ``several`` is traced when the program is lowered, which may be in another context.
        wide = jax.config.jax_enable_x64
        return _by_devices.bind(*arrays, jaxpr=jaxpr, several=several, wide=wide)

    return differentiable(either, one)(*arrays)


def differentiable(either: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``either``, which has no derivative and no batching rule, with those of ``plain``."""

    @jax.custom_jvp
    def run(*operands):
        return jax.custom_batching.sequential_vmap(lambda *own: either(*own))(*operands)

    @run.defjvp
    def _(operands, tangents):
        return run(*operands), jax.jvp(plain, operands, tangents)[1]

    return run


def splits_rows(*arrays: Any) -> bool:
    """Whether XLA's partitioner splits what is made of them: not explicit or manual axes of a mesh,
    which types tell."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    automatic = all(kind == AxisType.Auto for mesh in meshes for kind in mesh.axis_types)
    # XLA's older partitioner ends the process at operations that only the newer one can split.
    return automatic and getattr(jax.config, "jax_use_shardy_partitioner", True)


_by_devices = core.Primitive("by_devices")
_by_devices.multiple_results = True


@_by_devices.def_impl
def _(*arrays, **params):
    return jax.jit(functools.partial(_by_devices.bind, **params))(*arrays)


@_by_devices.def_abstract_eval
def _(*arrays, jaxpr, several, wide):
    del arrays, several, wide
    return jaxpr.out_avals


def _lowered(context, *operands, jaxpr, several, wide):
    program = context.module_context.axis_context
    # Other contexts are those of manual axes, inside of ``shard_map``.
    devices = program.num_devices if isinstance(program, mlir.ShardingContext) else 1
    own = core.jaxpr_as_fun(jaxpr) if devices == 1 else functools.partial(several, devices)
    with jax.enable_x64(wide):
        return mlir.lower_fun(own)(context, *operands)


mlir.register_lowering(_by_devices, _lowered)
