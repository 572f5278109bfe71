"""What all processes of a run do together, once JAX knows of all of them."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def are_several() -> bool:
    """Whether this is one of several processes. Before there are any, no device is asked for."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what belongs to the whole run."""
    return not are_several() or jax.process_index() == 0


def meet(where: str) -> None:
    """Waits for all processes of the run to come to the same place."""
    if are_several():
        multihost_utils.sync_global_devices(where)


def largest(number: int) -> int:
    """The largest of the numbers that the processes give."""
    if not are_several():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())
