"""What several commands do with their options."""

import os
from pathlib import Path

import jax

from ghostjax.runs.analysis.duplicates import LEAST_SIMILARITY
from ghostjax.runs.errors import UsageError


def check_choice(kind: str, wanted: str | None, choices: list[str]) -> None:
    """Raises ``UsageError`` for a name that is not there; the first twenty that are, are named."""
    if wanted is not None and wanted not in choices:
        more = ", ..." if len(choices) > 20 else ""
        known = ", ".join(choices[:20]) + more
        raise UsageError(f"no {kind} {wanted!r} in the run: expected one of {known}")


def check_count(count: int | None) -> None:
    """Raises ``UsageError`` for a number of examples below one."""
    if count is not None and count < 1:
        raise UsageError(f"--count must be at least 1, got {count}")


def check_formats(csv: bool, json: bool) -> None:
    """Raises ``UsageError`` where both formats are asked for."""
    if csv and json:
        raise UsageError("--csv and --json exclude each other: give one of them")


def check_similarity(option: str, similarity: float) -> None:
    """Raises ``UsageError`` for one that duplicates cannot be found by."""
    if not LEAST_SIMILARITY <= similarity <= 1:
        raise UsageError(
            f"--{option} must be from {LEAST_SIMILARITY} to 1, got {similarity:g}: of pairs that "
            "are less alike, too many would be missed"
        )


def use_compilation_cache(wanted: bool) -> None:
    """Keeps what XLA compiles for later runs, in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    A cache that JAX was given already, as by ``JAX_COMPILATION_CACHE_DIR``, stays. Where there can
    be no folder, every run compiles.
    """
    if not wanted or jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        path = (Path(home) if home else Path.home() / ".cache") / "ghostjax" / "compiled"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A step is several programs, some of which compile within a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
