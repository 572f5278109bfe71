"""Whether a run goes on with what it began with: data, weights, and the functions of a task."""

from collections.abc import Mapping
from typing import Any

from ghostjax.runs.errors import UsageError

_TRACED_BY = ("jax", "flax", "optax")  # of other versions, the same function is another program


def check_data(begun: Mapping[str, Any], digests: Mapping[str, str], whole: str, out: Any) -> None:
    """Raises ``UsageError`` for data that changed, naming which.

    Args:
      begun: What ``run.json`` holds.
      digests: Of the parts of the data, by name; ``whole``: of all.
    """
    if begun["fingerprints"]["data"] == whole:
        return
    before = begun.get("data", {})
    names = [name for name in {**before, **digests} if before.get(name) != digests.get(name)]
    which = f": {', '.join(names)}" if before and names else ""
    raise UsageError(f"{out}: the data changed since the run began{which}")


def check_params(begun: Mapping[str, Any], params: str, what: str, out: Any) -> None:
    """Raises ``UsageError`` for other initial parameters than those the run began with."""
    if begun["fingerprints"]["params"] != params:
        raise UsageError(f"{out}: {what} changed since the run began")


def check_programs(
    begun: Mapping[str, Any], programs: Mapping[str, str], versions: Mapping[str, str], out: Any
) -> None:
    """Raises ``UsageError`` for functions of a task that compute something else now."""
    before = begun.get("versions", {})
    if any(before.get(name) != versions.get(name) for name in _TRACED_BY):
        return
    known = begun.get("programs", {})
    changed = [name for name in {**known, **programs} if known.get(name) != programs.get(name)]
    if changed:
        raise UsageError(f"{out}: the task's {' and '.join(changed)} changed since the run began")
