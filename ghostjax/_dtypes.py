"""The dtype in which numbers are added up."""

from typing import Any

import jax.numpy as jnp


def wide_dtype(*arrays: Any) -> jnp.dtype:
    """float32 for everything narrower, float64 where one of the arrays has it."""
    found = any(jnp.result_type(a) in (jnp.float64, jnp.complex128) for a in arrays)
    return jnp.dtype(jnp.float64 if found else jnp.float32)
