"""Arrays: a perceptron classifies rows of numbers, such as tables or small images."""

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.elements import array_elements
from ghostjax.runs.data.task import Example, Examples, Skipped, check_stems
from ghostjax.runs.errors import UsageError
from ghostjax.runs.models import SIZES, Classifier

MAX_CLASSES = 2**20  # every label up to the largest is an output of the model


class Arrays(NamedTuple):
    """Examples of a classification: ids [N], x [N, D] float32 and y [N] int32."""

    ids: list[str]
    x: np.ndarray
    y: np.ndarray


class ArrayTask:
    """Labelled arrays and a classifier. Features are scaled by their training mean and spread."""

    name = "arrays"
    unit = "nats"
    optimizer = None

    def __init__(self, train: Arrays, val: dict[str, Arrays], model: Classifier):
        self.skipped = Skipped()
        self.examples = _ArrayExamples(train)
        self.val_examples = {name: _ArrayExamples(arrays) for name, arrays in val.items()}
        self.val_sizes = {name: len(arrays.y) for name, arrays in val.items()}
        self._train = train
        self._val = val
        self._model = model
        spread = train.x.std(axis=0)
        self._center, self._scale = train.x.mean(axis=0), np.where(spread > 0, spread, 1)

    def init_params(self, seed: int) -> Any:
        x = jnp.zeros((1, self._train.x.shape[1]), jnp.float32)
        return jax.jit(self._model.init)(jax.random.key(seed), x)["params"]

    def row_losses(self, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        """Cross-entropy of every row, in nats."""
        logits = self._model.apply({"params": params}, rows["x"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows["y"])

    def train_rows(self, indices, rng, own=slice(None)):
        del rng
        return self._rows(self._train, indices[own]), np.zeros(len(indices), int)

    def val_rows(self, name, indices, rng, own=slice(None)):
        del rng
        return self._rows(self._val[name], indices[own])

    def elements(self, index: int) -> np.ndarray:
        return array_elements(self._train.x[index])

    def contents(self) -> dict[str, Any]:
        parts = {f"validation set {name}": arrays[1:] for name, arrays in self._val.items()}
        return {"training examples": self._train, **parts}

    def _rows(self, arrays: Arrays, indices: np.ndarray) -> dict[str, np.ndarray]:
        x = (arrays.x[indices] - self._center) / self._scale
        return {"x": x.astype(np.float32), "y": arrays.y[indices]}


def load_arrays(config: TrainConfig) -> ArrayTask:
    """The examples of the configured .npz files.

    Raises:
      UsageError: a file cannot be read, or files do not fit together; or an option is for texts.
    """
    for name in ("tokenizer", "length", "id_field", "domain_field"):
        option = "--" + name.replace("_", "-")
        if getattr(config, name) is not None:
            raise UsageError(f"{option} is for texts, and --train has arrays")
    train = read_arrays(config.train_files)
    val = {name: read_arrays(paths) for name, paths in config.val_files.items()}
    for name, arrays in val.items():
        if arrays.x.shape[1] != train.x.shape[1]:
            raise UsageError(
                f"validation set {name}: x has {arrays.x.shape[1]} numbers per example, "
                f"but {train.x.shape[1]} in --train"
            )
    classes = 1 + max(int(arrays.y.max()) for arrays in (train, *val.values()))
    model = Classifier(SIZES[config.model], classes, jnp.dtype(config.dtype), config.remat)
    return ArrayTask(train, val, model)


def read_arrays(paths: Collection[Path]) -> Arrays:
    """The examples of .npz files, one after another, with ids ``stem:index``.

    Raises:
      UsageError: a file cannot be read, or has not x [N, ...], finite numbers, and y [N], integers
        from 0; or files disagree on the shape of an example, or two have one stem.
    """
    ids, xs, ys = [], [], []
    check_stems(paths)
    for path in paths:
        x, y = _read_file(path)
        if xs and x.shape[1] != xs[0].shape[1]:
            raise UsageError(
                f"{path}: x has {x.shape[1]} numbers per example, other files {xs[0].shape[1]}"
            )
        ids += [f"{path.stem}:{index}" for index in range(len(y))]
        xs.append(x)
        ys.append(y)
    return Arrays(ids, np.concatenate(xs), np.concatenate(ys))


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("x", "y") if name not in file.files]
            if missing:
                raise UsageError(f"{path}: no array {' and '.join(missing)} in it")
            x, y = file["x"], file["y"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    # TypeError: an .npy file by another name is no context manager.
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not an .npz file of numbers") from error
    if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0:
        raise UsageError(f"{path}: y must be integers from 0, [N]; found {y.dtype}{list(y.shape)}")
    if y.max() >= MAX_CLASSES:
        raise UsageError(f"{path}: y must be less than {MAX_CLASSES}; found {y.max()}")
    if x.ndim < 2 or len(x) != len(y) or not x.size or x.dtype.kind not in "iuf":
        raise UsageError(
            f"{path}: x must be numbers, [{len(y)}, ...] like y; found {x.dtype}{list(x.shape)}"
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        x = x.reshape(len(x), -1).astype(np.float32)
    if not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise UsageError(f"{path}: x[{bad}] has a number that is not finite")
    return x, y.astype(np.int32)


class _ArrayExamples(Examples):
    def __init__(self, arrays: Arrays):
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays.y)

    def __getitem__(self, n: int) -> Example:
        name, x, label = (each[n] for each in self._arrays)
        return Example(name, f"label-{label}", len(x), _excerpt(x, label))


def _excerpt(row: np.ndarray, label: int) -> str:
    numbers = " ".join(f"{number:g}" for number in row[:24])
    return f"label {label}: {numbers}{' ...' if len(row) > 24 else ''}"
