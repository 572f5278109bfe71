"""Settings for every test, made before JAX is imported."""

import os

# Eight virtual devices are for the sharding tests. Without excess precision bfloat16 means the same
# in two compiled programs, so that they can be compared. Compiling is most of the suite's time, and
# less of it goes into optimizing programs that run once.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_allow_excess_precision=false",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """For models that mix dtypes themselves, as Flax's norms do in bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield
