"""Checkpoints of a run: complete or absent, and restored bit for bit.

``checkpoints`` is the directory of an orbax ``CheckpointManager``: of every step it has one flat
dictionary, from the path of each leaf to its array. So it can be read with orbax alone, and neither
names with dots nor custom nodes matter. ``contents.json`` of a step says which run it is of and
lists the arrays and the digests of its files: orbax meets a damaged file with tracebacks from its
threads, or not at all. Orbax renames the folder of a step when all of it is there; what seals it
stands in the place of that renaming.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ghostjax.runs.errors import UsageError
from ghostjax.runs.processes.collective import is_first
from ghostjax.runs.store.files import read_json, sync_directory, write_json

# Orbax takes half a second to import: only the functions that need it do.

KEPT = 2

_FOLDER = "checkpoints"
_CONTENTS = "contents.json"

_State = TypeVar("_State")


def save(out: Path, step: int, state: Any, run: Mapping[str, Any] | None = None) -> None:
    """Saves a pytree of ``jax.Array`` as the checkpoint of ``step``, later than those that are
    there; keeps the newest two. Of several processes, all must call it.

    ``run``, JSON, is what tells the run from others; ``restore`` must be given the same.

    When this returns, it is on disk. Killed before, it leaves the older checkpoints and the new one
    as a whole or not at all.

    Raises:
      TypeError: a leaf is not a ``jax.Array``.
      OSError: it cannot be written; the older checkpoints are as before.
    """
    import orbax.checkpoint as ocp

    arrays = _by_path(state)
    for name, leaf in arrays.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"checkpoint: {name} must be a jax.Array, got {type(leaf).__name__}.")

    contents = {
        "run": dict(run or {}),
        "arrays": {name: _describe(leaf) for name, leaf in arrays.items()},
    }

    class Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            """In the place of orbax's own, which changes files before it renames their folder."""
            folder, final = Path(self.get()), Path(self.get_final())
            if final.parent.name == _FOLDER:  # the checkpoint, not an item of it
                _sync_tree(folder)
                write_json(folder / _CONTENTS, {**contents, "files": _digests(folder)})
            os.replace(folder, final)

    # Orbax refuses empty arrays; restoring takes them from ``like``.
    kept = ocp.args.StandardSave({name: leaf for name, leaf in arrays.items() if leaf.size})
    options = {"max_to_keep": KEPT, "cleanup_tmp_directories": True}
    try:
        with _manager(out, temporary_path_class=Sealed, **options) as manager:
            manager.save(step, args=kept, force=True)
    except (OSError, ValueError) as error:
        # Tensorstore raises ValueError for what the system refuses, such as to fill a disk further.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(_folder(out))) from error
    sync_directory(_folder(out))


def latest(out: Path) -> int | None:
    """The step of the newest checkpoint, or None where there is none."""
    return max(available(out), default=None)


def available(out: Path) -> list[int]:
    """The steps of all checkpoints, the oldest first."""
    return _steps(_folder(out))


def restore(out: Path, step: int, like: _State, run: Mapping[str, Any] | None = None) -> _State:
    """The state that was saved for ``step``, equal in every bit, as a tree like ``like``.

    Args:
      like: A state of the same structure, or one of ``jax.ShapeDtypeStruct``. What is static in it
        is taken from it, and an array is put on the devices of its leaf. All arrays come back with
        strong types.

    Raises:
      UsageError: one line: there is no such checkpoint, it is damaged, it was saved for another
        ``run``, or its arrays are not those of ``like`` in their paths, shapes and dtypes.
    """
    import orbax.checkpoint as ocp

    path = _folder(out) / str(step)
    if not path.is_dir():
        raise UsageError(f"{path} is missing")
    contents = _read_contents(path)
    saved_for, wanted = contents["run"], dict(run or {})
    if saved_for != wanted:
        names = sorted(saved_for.keys() | wanted.keys())
        name = next(name for name in names if saved_for.get(name) != wanted.get(name))
        raise UsageError(
            f"{path} is of another run: {name} is {saved_for.get(name)}, expected "
            f"{wanted.get(name)}; put back the checkpoints of this run"
        )
    have = contents["arrays"]
    leaves = _by_path(like)
    problems = _differences(have, {name: _describe(leaf) for name, leaf in leaves.items()})
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{path} does not fit this run: {problems[0]}{more}")
    places = {name: _place(leaf) for name, leaf in leaves.items()}
    abstract = {
        # Without a place as NumPy: otherwise they would go where they were saved from.
        name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        if places[name] is None
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in leaves.items()
        if leaf.size
    }
    with _manager(out, read_only=True, create=False, save_interval_steps=0) as manager:
        arrays = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    restored = [
        jax.device_put(arrays.get(name, np.zeros(leaf.shape, leaf.dtype)), places[name])
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


@contextlib.contextmanager
def _manager(out: Path, **options: Any) -> Iterator[Any]:
    import orbax.checkpoint as ocp

    how = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    with quiet(), ocp.CheckpointManager(_folder(out).absolute(), options=how) as manager:
        yield manager


def _folder(out: Path) -> Path:
    return out / _FOLDER


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal())


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _read_contents(path: Path) -> dict[str, dict[str, Any]]:
    """``contents.json`` of a checkpoint, once every file of it is known to be as it was written."""
    try:
        contents = read_json(path / _CONTENTS)
        files = contents["files"]
        if not is_first():  # which reads all of them for the others
            return contents
        if not all(isinstance(contents[name], dict) for name in ("run", "arrays", "files")):
            raise TypeError
        found = _digests(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path, f"{_CONTENTS} cannot be read") from error
    for name, digest in files.items():
        if found.get(name) != digest:
            raise _damaged(path, f"{name} {'has changed' if name in found else 'is missing'}")
    return contents


def _damaged(path: Path, problem: str) -> UsageError:
    others = [step for step in _steps(path.parent) if str(step) != path.name]
    way_out = "put it back as it was, or start again in a new directory"
    if others and max(others) < int(path.name):
        way_out = f"delete it to resume from step {max(others)}, the checkpoint before it"
    return UsageError(f"{path} is damaged ({problem}): {way_out}")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 by the files' names in the folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / _CONTENTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _differences(have: dict[str, str], want: dict[str, str]) -> list[str]:
    return (
        [f"it lacks {name}" for name in want if name not in have]
        + [f"it has {name}, which the run has not" for name in have if name not in want]
        + [
            f"{name} is {have[name]}, expected {want[name]}"
            for name in want
            if name in have and have[name] != want[name]
        ]
    )


def _describe(array: Any) -> str:
    return f"{np.dtype(array.dtype)}{list(array.shape)}"


def _place(leaf: Any) -> jax.sharding.Sharding | None:
    """On which devices an array like ``leaf`` is to be, where it has a place of its own.

    One without must not get one: jit refuses to mix such with others.
    """
    has_place = leaf.committed if isinstance(leaf, jax.Array) else True
    return leaf.sharding if has_place else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without orbax's logging, which goes to stderr; what matters is raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(parent))
