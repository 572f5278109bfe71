"""Given weights: parameters of the same names and shapes, from orbax or safetensors."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.checkpoints import quiet

MAX_LISTED = 6  # differences


def read_weights(path: Path, like: Any) -> Any:
    """Parameters like ``like``, with the numbers in ``path``.

    Names are those of a parameter's path, joined by dots: ``blocks.qkv.kernel``. The path is a
    directory that orbax wrote, of parameters or of a tree that has them under ``params``, a
    checkpoint of a ghostjax run among them; or a ``.safetensors`` file.

    Numbers take the dtype of ``like``.

    Raises:
      UsageError: one line: it cannot be read, or what differs between its names and shapes and
        those of ``like``.
    """
    if not path.exists():
        raise UsageError(f"--init-from {path} does not exist")
    found = _of_orbax(path) if path.is_dir() else _of_safetensors(path)
    paths = jax.tree_util.tree_leaves_with_path(like)
    wanted = {_name(jax.tree_util.keystr(place)): leaf for place, leaf in paths}
    if not found.keys() & wanted.keys():
        below = {name.removeprefix("params."): own for name, own in found.items()}
        found = {n: own for n, own in below.items() if f"params.{n}" in found} or found
    problems = (
        [f"it lacks {name} {_shape(leaf)}" for name, leaf in wanted.items() if name not in found]
        + [f"it has {name} {_shape(own)}" for name, own in found.items() if name not in wanted]
        + [
            f"{name} is {_shape(found[name])}, expected {_shape(leaf)}"
            for name, leaf in wanted.items()
            if name in found and _shape(found[name]) != _shape(leaf)
        ]
    )
    if problems:
        listed = "; ".join(problems[:MAX_LISTED])
        more = f"; and {len(problems) - MAX_LISTED} more" if problems[MAX_LISTED:] else ""
        raise UsageError(f"--init-from {path} does not fit the model: {listed}{more}")
    for name in wanted:
        if not jnp.issubdtype(found[name].dtype, jnp.floating):
            raise UsageError(f"--init-from {path}: {name} is {found[name].dtype}, not of floats")
    leaves = [jnp.array(found[name], leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _of_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise UsageError(
            f'--init-from {path} needs safetensors: pip install "ghostjax[safetensors]"'
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--init-from {path}: no safetensors file ({reason})") from error


def _of_orbax(path: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    # A CheckpointManager keeps each item in a folder of its step.
    inside = [path / name for name in ("default", "params", "state") if (path / name).is_dir()]
    folder = inside[0] if inside and not (path / "_METADATA").exists() else path
    try:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(folder.absolute()).item_metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            restore = ocp.args.PyTreeRestore(restore_args=args)
            tree = checkpointer.restore(folder.absolute(), args=restore)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--init-from {path}: no orbax checkpoint ({reason}); of a run, take "
            "RUN/checkpoints/STEP"
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {_name(jax.tree_util.keystr(place)): np.asarray(leaf) for place, leaf in leaves}
    # A ghostjax run keeps the paths of parameters and optimizer in one flat dictionary.
    flat = {name: leaf for name, leaf in tree.items() if str(name).startswith(".params")}
    return {_name(name): np.asarray(leaf) for name, leaf in flat.items()} if flat else found


def _name(path: str) -> str:
    """
    >>> _name("['layers'][0].weight"), _name("['linear']['kernel'].value"), _name(".params['a']")
    ('layers.0.weight', 'linear.kernel', 'params.a')
    """
    words = re.findall(r"[^\[\]'\.]+", path)
    return ".".join(words[:-1] if words[-1] == "value" and len(words) > 1 else words)


def _shape(array: Any) -> str:
    return str(list(array.shape))
