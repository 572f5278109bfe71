"""In-run data values: scores of rows, added up per training example while training runs."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InRunValues:
    """The value of every training example so far: the sum of its rows' scores.

        values[n, k] = sum over steps, and over rows i of example n, of scores[i, k]

    With scores in the unit of the validation loss (dots through the optimizer over B), a value is
    the predicted decrease of that loss which the example has caused. Positive helps.

    Attributes:
      values: [n_examples, K] float32, one column per validation set.
      visits: [n_examples] int32, how many rows were added.
      rejected: int32 scalar, how many rows had an id of ``n_examples`` or more: see ``check``.
      names: of the K validation sets, static.

    It is a pytree of arrays with fixed shapes: carry it through ``jax.jit`` and ``jax.lax.scan``,
    donate it, save it with orbax beside the train state.

    >>> import jax.numpy as jnp
    >>> values = InRunValues.zeros(3)
    >>> values = values.add(jnp.array([0, 2, 0, -1]), jnp.array([1.0, -2.0, 0.5, 9.0]))
    >>> values.of("val"), values.visits
    (Array([ 1.5,  0. , -2. ], dtype=float32), Array([2, 0, 1], dtype=int32))

    Source: Data Shapley in One Training Run, arXiv:2406.11011, sections 3 and 4.
    """

    values: jax.Array
    visits: jax.Array
    rejected: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, n_examples: int, names: Sequence[str] = ("val",)) -> "InRunValues":
        """Before the first step. ``n_examples`` is static.

        Raises:
          ValueError: there are no examples, or no names, or names that are equal.
        """
        names = tuple(names)
        if n_examples < 1:
            raise ValueError(f"n_examples must be at least 1, got {n_examples}.")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be different, at least one: got {names!r}.")
        return cls(
            jnp.zeros((n_examples, len(names)), jnp.float32),
            jnp.zeros(n_examples, jnp.int32),
            jnp.zeros((), jnp.int32),
            names,
        )

    def add(self, ids: jax.Array, scores: jax.Array) -> "InRunValues":
        """The values after a batch.

        Args:
          ids: [B] integers, which example each row is of; an id may occur several times. Rows with
            a negative id are padding and are passed over, whatever their score.
          scores: [B, K], or [B] with a single validation set.

        Raises:
          ValueError, TypeError: shapes or dtypes do not fit; or an id is ``n_examples`` or more,
            where it is known: under ``jax.jit`` such rows are counted instead, see ``check``.
        """
        ids, scores = jnp.asarray(ids), jnp.asarray(scores)
        count, kinds = self.values.shape
        if not jnp.issubdtype(ids.dtype, jnp.signedinteger):
            raise TypeError(f"ids must be signed integers (negative: padding), got {ids.dtype}.")
        if scores.ndim == 1 and kinds == 1:
            scores = scores[:, None]
        if ids.ndim != 1 or scores.shape != (*ids.shape, kinds):
            raise ValueError(
                f"ids must be [B] and scores [B, {kinds}] for validation sets {self.names}, got "
                f"ids {list(ids.shape)} and scores {list(scores.shape)}."
            )
        if not jnp.issubdtype(scores.dtype, jnp.floating):
            raise TypeError(f"scores must be floating point, got {scores.dtype}.")
        if ids.dtype.itemsize < 4:  # n_examples must fit
            ids = ids.astype(jnp.int32)
        is_row = ids >= 0
        # Index n_examples is out of bounds, and mode "drop" leaves it out; a negative one would
        # count from the end.
        places = jnp.where(is_row, ids, count)
        added = dataclasses.replace(
            self,
            values=self.values.at[places].add(scores.astype(jnp.float32), mode="drop"),
            visits=self.visits.at[places].add(1, mode="drop"),
            rejected=self.rejected + jnp.sum(ids >= count, dtype=jnp.int32),
        )
        if not isinstance(added.rejected, jax.core.Tracer):
            added.check()
        return added

    def of(self, name: str) -> jax.Array:
        """The values for one validation set, [n_examples].

        Raises:
          ValueError: there is no such set.
        """
        if name not in self.names:
            raise ValueError(f"no validation set {name!r}: there are {', '.join(self.names)}.")
        return self.values[:, self.names.index(name)]

    def check(self) -> None:
        """Outside ``jax.jit``: that every row so far had an id there is an example for.

        Raises:
          ValueError: some had not; their scores are in no value.
        """
        rejected = int(np.asarray(self.rejected))
        if rejected:
            raise ValueError(
                f"{rejected} rows had an id of {len(self.visits)} or more, but there are "
                f"{len(self.visits)} examples (ids 0 to {len(self.visits) - 1}): give InRunValues "
                "the number of all examples."
            )
