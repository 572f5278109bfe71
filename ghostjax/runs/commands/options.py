"""Checks of options that several commands have."""

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
