"""A ``ghostjax.Task``: found by its name, read through once, and handed to a run in rows."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._checks import check_parameters
from ghostjax._errors import ParameterError
from ghostjax._task import Source, Task
from ghostjax.runs.config import check_set_name
from ghostjax.runs.data.documents import Ids
from ghostjax.runs.data.elements import array_elements
from ghostjax.runs.data.task import Example, Examples, Skipped
from ghostjax.runs.errors import UsageError
from ghostjax.runs.listed import Listed, is_unicode

FOR_THE_LOG = ("id", "domain", "excerpt")
EXCERPT = 12  # numbers of an array


class OwnTask:
    """A task of the user's. Its sources are read through once here, and by number afterwards.

    Raises:
      UsageError: one line: a source is none or empty, its examples have not the same arrays, or
        the same ids; there is no validation set; the parameters are not floating-point arrays.
    """

    name = "own"

    def __init__(self, task: Task):
        for name in ("init", "row_losses"):
            if not callable(getattr(task, name)):
                raise UsageError(
                    f"task.{name} must be a function, got {_kind(getattr(task, name))}"
                )
        optimizer = task.optimizer
        is_optimizer = hasattr(optimizer, "init") and hasattr(optimizer, "update")
        if optimizer is not None and not is_optimizer:
            raise UsageError(
                f"task.optimizer must be an optax GradientTransformation, got {_kind(optimizer)}"
            )
        if not isinstance(task.val, Mapping):
            raise UsageError(
                "task.val must be a dictionary of validation sets by name, such as "
                f'{{"val": source}}, got {_kind(task.val)}'
            )
        if not task.val:
            raise UsageError("task.val has no validation set: give held-out examples by name")
        for name in task.val:
            check_set_name(name, "task.val")
        self.unit = task.unit
        self.optimizer = optimizer
        self.row_losses = task.row_losses
        self._task = task
        self.skipped = Skipped()
        ids, shape = Ids(), None
        self.examples, self._digests = _Listed(), {"training examples": bytearray()}
        for index, read in enumerate(_read("task.train", task.train)):
            self.examples.add(_example("train", index, read))
            self._digests["training examples"] += read.digest
            ids.add(self.examples.id(index))
        self._check_ids(ids.twice())
        self.val_examples: dict[str, Examples] = {}
        for name, source in task.val.items():
            digests = self._digests[f"validation set {name}"] = bytearray()
            held_out = self.val_examples[name] = _Listed()
            for index, read in enumerate(_read(f'task.val["{name}"]', source, shape)):
                held_out.add(_example(name, index, read))
                digests += read.digest
                shape = read.shape
        self.val_sizes = {name: len(source) for name, source in task.val.items()}

    def init_params(self, seed: int) -> Any:
        params = self._task.init(seed)
        try:
            check_parameters(params)
        except ParameterError as error:
            raise UsageError(f"task.init: {' '.join(str(error).split())}") from error
        if not jax.tree.leaves(params):
            raise UsageError("task.init gave no parameters")
        # A copy, as the run gives up their buffers; and leaves that are one array become several.
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), params)

    def train_rows(self, indices, rng, own=slice(None)):
        del rng
        return _stacked("task.train", self._task.train, indices[own]), np.zeros(len(indices), int)

    def val_rows(self, name, indices, rng, own=slice(None)):
        del rng
        return _stacked(f'task.val["{name}"]', self._task.val[name], indices[own])

    def elements(self, index: int) -> np.ndarray:
        return array_elements(*jax.tree.leaves(_row(self._task.train[int(index)])))

    def contents(self) -> dict[str, Any]:
        return {name: _texts_of(digests) for name, digests in self._digests.items()}

    def _check_ids(self, twice: tuple[int, int] | None) -> None:
        if twice is not None:
            raise UsageError(
                f"task.train[{twice[0]}] and task.train[{twice[1]}] have the same id "
                f"{self.examples.id(twice[0])!r}: values are added up by id, so every example "
                "needs one of its own"
            )


def _texts_of(digests: bytearray) -> Iterator[str]:
    size = hashlib.sha256().digest_size
    return (digests[n : n + size].hex() for n in range(0, len(digests), size))


class _Listed(Listed, Examples):
    """Examples of a source, in columns."""

    def __init__(self) -> None:
        super().__init__(Example._make)


def find_task(name: str, folders: Sequence[Path]) -> Task:
    """The task that ``module:function`` returns; modules are looked for in ``folders``, too.

    Raises:
      UsageError: there is none.
    """
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        raise UsageError(
            f"--task {name}: expected module:function, such as my_package.my_module:make_task"
        )
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # What the module itself imports in vain is told as such.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        where = " or ".join(dict.fromkeys(map(str, folders)))
        raise UsageError(
            f"--task {name}: there is no module {error.name} in {where}, nor where Python looks "
            "for modules"
        ) from error
    if not hasattr(module, attribute):
        raise UsageError(f"--task {name}: {module_name} has no {attribute}")
    return made_task(getattr(module, attribute), name)


def made_task(task: Task | Callable[[], Task], name: str) -> Task:
    """A task, or what a function that makes one returns; ``UsageError`` for anything else."""
    if isinstance(task, Task):
        return task
    if not callable(task):
        raise UsageError(f"--task {name} is {_kind(task)}, expected a function that returns a Task")
    made = task()
    if not isinstance(made, Task):
        raise UsageError(f"--task {name} returned {_kind(made)}, expected a ghostjax.Task")
    return made


class _Read(NamedTuple):
    """An example: what is for the log, its row, and the row's shape and digest, with the id."""

    about: dict[str, str]
    row: dict[str, Any]
    shape: dict[str, str]
    digest: bytes


def _read(where: str, source: Source, shape: dict[str, str] | None = None) -> Iterator[_Read]:
    """All examples of a source, in order, which must have one shape: that given, or the first's."""
    usable = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not usable or isinstance(source, Mapping | str):
        raise UsageError(
            f"{where} must have len() and take numbers in [], as lists and PyGrain data sources "
            f"do, got {_kind(source)}"
        )
    if not len(source):
        raise UsageError(f"{where} has no examples")
    first = "the examples of other validation sets"
    for index in range(len(source)):
        read = _read_one(f"{where}[{index}]", source[index])
        if shape is None:
            shape, first = read.shape, f"{where}[{index}]"
        if read.shape != shape:
            differing = sorted(read.shape.items() ^ shape.items())[0][0]
            raise UsageError(
                f"{where}[{index}] has {differing} {read.shape.get(differing, 'not at all')}, but "
                f"{first}: {shape.get(differing, 'not at all')}; examples must have equal shapes: "
                "pad them, with a mask"
            )
        yield read


def _read_one(where: str, example: Any) -> _Read:
    if not isinstance(example, Mapping):
        raise UsageError(
            f"{where} must be a dictionary of arrays, with id and domain if there are, got "
            f"{_kind(example)}"
        )
    about = {key: str(example[key]) for key in FOR_THE_LOG if example.get(key) is not None}
    for key, text in about.items():
        if not is_unicode(text):
            raise UsageError(
                f"{where}: its {key} {text!r} is no Unicode text, as a file's name may be: give "
                f"another, such as {key}.encode(errors='backslashreplace').decode()"
            )
    row = _row(example)
    leaves = jax.tree_util.tree_leaves_with_path(row)
    shape = {}
    digest = hashlib.sha256(f"{about.get('id')}\n{about.get('domain')}\n".encode())
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if leaf.dtype.kind not in "biufV" or leaf.dtype.hasobject or leaf.dtype.names:
            raise UsageError(f"{where}: {name} is no array of numbers but {leaf.dtype}")
        shape[name] = f"{leaf.dtype}{list(leaf.shape)}"
        digest.update(f"{name} {shape[name]}\n".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    if not leaves:
        raise UsageError(f"{where} has no arrays beside {', '.join(FOR_THE_LOG)}")
    return _Read(about, row, shape, digest.digest())


def _row(example: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in example.items() if key not in FOR_THE_LOG}
    return jax.tree.map(np.asarray, row)


def _example(source: str, index: int, read: _Read) -> Example:
    leaves = jax.tree.leaves(read.row)
    excerpt = read.about.get("excerpt")
    if excerpt is None:
        excerpt = "; ".join(_numbers(leaf.reshape(-1)) for leaf in leaves[:4])
    return Example(
        read.about.get("id", f"{source}:{index}"),
        read.about.get("domain", source),
        sum(leaf.size for leaf in leaves),
        excerpt,
    )


def _numbers(array: np.ndarray) -> str:
    shown = " ".join(f"{number:g}" for number in array[:EXCERPT].astype(np.float64))
    return shown + (" ..." if len(array) > EXCERPT else "")


def _stacked(where: str, source: Source, indices: np.ndarray) -> Any:
    rows = [_row(source[int(index)]) for index in indices]
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    except ValueError as error:
        raise UsageError(f"{where}: its examples changed since the run began") from error


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
