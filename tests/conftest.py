"""Settings for every test, made before JAX is imported."""

import gc
import importlib.metadata
import os
import shutil
import tempfile

# Eight virtual devices are for the sharding tests. Without excess precision bfloat16 means the same
# in two compiled programs, so that they can be compared. Compiling is most of the suite's time, and
# less of it goes into optimizing programs that run once: without the newer emitters of code, which
# take four times as long, where XLA still has the older ones.
_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
_OLDER_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if _JAXLIB < (0, 11) else []
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_allow_excess_precision=false",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *_OLDER_EMITTERS,
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# What one test or worker has compiled, no other compiles again.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWN_CACHE = None if _CACHE in os.environ else tempfile.mkdtemp(prefix="ghostjax-tests-")
if _OWN_CACHE is not None:
    os.environ[_CACHE] = _OWN_CACHE

# Tracing makes many objects of which few are garbage: looking for it rarely saves a tenth.
gc.set_threshold(50_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a test that is marked ``quick`` with names, all other variants are slow."""
    left = {}
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is None:
            continue
        name = item.nodeid.partition("[")[0]
        left.setdefault(name, {*quick.args}).discard(item.callspec.id)
        if item.callspec.id not in quick.args:
            item.add_marker(pytest.mark.slow)
    is_all = not any("::" in argument for argument in config.args)
    unknown = {name: sorted(own) for name, own in left.items() if own}
    if is_all and unknown:
        raise pytest.UsageError(f"no variants have these names that are to be quick: {unknown}")


def pytest_unconfigure():
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture
def standard_promotion():
    """For models that mix dtypes themselves, as Flax's norms do in bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield
