"""Parameters by the patterns of their paths."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax


def parted(params: Any, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves by their paths, those that no pattern fits and those that one does.

    Paths are written "layer/kernel", and patterns are those of ``fnmatch``, for the whole path:
    "*" also goes over "/".

    Raises:
      TypeError: ``patterns`` is a single string.
      ValueError: a pattern fits no path, or every path fits one.

    >>> parted({"embed": 1, "out": {"kernel": 2, "bias": 3}}, ["out/*"])
    ({'embed': 1}, {'out/bias': 3, 'out/kernel': 2})
    """
    if isinstance(patterns, str):
        raise TypeError(f"exclude must be a sequence of patterns, got the string {patterns!r}.")
    leaves = paths_of(params)
    unknown = [own for own in patterns if not fnmatch.filter(leaves, own)]
    if unknown:
        raise ValueError(
            f"exclude has patterns that fit no parameter: {', '.join(map(repr, unknown))}. The "
            "parameters are\n" + "\n".join(f"  {path}" for path in leaves)
        )
    out = {path for own in patterns for path in fnmatch.filter(leaves, own)}
    if len(out) == len(leaves):
        raise ValueError(
            "exclude leaves out every parameter, so that nothing is left to score with. Found "
            f"{', '.join(map(repr, patterns))}."
        )
    left = {path: leaf for path, leaf in leaves.items() if path not in out}
    return left, {path: leaf for path, leaf in leaves.items() if path in out}


def together(params: Any, leaves: dict[str, Any]) -> Any:
    """A tree like ``params`` of leaves by their paths."""
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [leaves[path] for path in paths_of(params)])


def paths_of(params: Any) -> dict[str, Any]:
    """Leaves by their paths.

    Raises:
      ValueError: two have the same.
    """
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/") or "params", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    if len(dict(found)) < len(found):
        paths = [path for path, _ in found]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(
            f"parameters must have different paths, but several are {', '.join(twice)}: rename "
            'those with a "/" in their names.'
        )
    return dict(found)
