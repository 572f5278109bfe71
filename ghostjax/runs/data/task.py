"""What a run needs to know of its data: examples to train on, validation sets, and their losses."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ghostjax.runs.errors import UsageError
from ghostjax.runs.listed import is_unicode

TOLD = 3  # of places of what is skipped


class Example(NamedTuple):
    """A training example, as ``examples.parquet`` lists it; or a held-out one."""

    id: str
    domain: str
    size: int
    excerpt: str


class Examples(Sequence[Example]):
    """Examples that need not be in memory. An example is known by its place here."""

    def id(self, index: int) -> str:
        """The id of one, where that takes less than all of it."""
        return self[index].id


@dataclasses.dataclass
class Skipped:
    """Data that is too short to be used.

    Attributes:
      count: how much there is.
      places: where the first few are, such as ``a.txt, line 3``.
    """

    count: int = 0
    places: list[str] = dataclasses.field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < TOLD:
            self.places.append(place)


class LoadedTask(Protocol):
    """Data and model of a run. Rows are dicts of arrays that share their leading axis.

    Attributes:
      name: "text", "arrays" or, of a ``ghostjax.Task``, "own".
      unit: of the loss.
      examples: the training examples.
      val_examples: the held-out examples of each validation set, by its name.
      val_sizes: how many those are.
      skipped: what is too short to be used.
      optimizer: what turns gradients into updates; None where the options say it.
    """

    name: str
    unit: str
    examples: Examples
    val_examples: dict[str, Examples]
    val_sizes: dict[str, int]
    skipped: Skipped
    optimizer: Any

    def init_params(self, seed: int) -> Any:
        """The model's initial parameters."""

    def row_losses(self, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        """Losses [N] of rows, float32."""

    def train_rows(
        self, indices: np.ndarray, rng: np.random.Generator, own: Any = slice(None)
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Rows of those of the examples that ``own`` chooses, and where in each of all its row
        starts."""

    def val_rows(
        self, name: str, indices: np.ndarray, rng: np.random.Generator, own: Any = slice(None)
    ) -> dict[str, np.ndarray]:
        """Rows of those of the held-out examples that ``own`` chooses."""

    def elements(self, index: int) -> np.ndarray:
        """What a training example is made of, for how alike two are: uint64 [n], ascending."""

    def contents(self) -> dict[str, Any]:
        """All data by what it is, for ``fingerprints``; iterators give them one by one."""


def check_stems(paths: Collection[Path]) -> None:
    """Raises ``UsageError`` where two files have one stem: examples would have the same ids; or a
    stem is no Unicode text, so that no id can have it."""
    stems: dict[str, Path] = {}
    for path in paths:
        if not is_unicode(path.stem):
            raise UsageError(f"{str(path)!r}: ids have its name, no Unicode text: rename it")
        if path.stem in stems:
            raise UsageError(
                f"{stems[path.stem]} and {path} have the same name up to the suffix, "
                "so their examples would have the same ids: rename one, or give texts an --id-field"
            )
        stems[path.stem] = path
