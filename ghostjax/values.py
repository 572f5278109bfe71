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

    Every sum is carried in two float32 numbers: after n rows its error is that of one rounding to
    float32 and at most n * 1.1e-14 of the sum of the scores' sizes. Runs that add the same rows in
    the same calls agree in every bit.

    Attributes:
      values: [n_examples, K] float32, one column per validation set: the float32 numbers nearest to
        the sums.
      compensation: [n_examples, K] float32, what ``values`` lacks by rounding; read ``values``
        alone, and keep both. 0 where the value is not finite.
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
    compensation: jax.Array
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
        values, compensation = _added(self.values, self.compensation, places, scores)
        added = dataclasses.replace(
            self,
            values=values,
            compensation=compensation,
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


@jax.jit
def _added(
    values: jax.Array, compensation: jax.Array, places: jax.Array, scores: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``values + compensation`` with the scores [B, K] added at places [B], those in bounds."""
    order = jnp.argsort(places, stable=True)
    places, scores = places[order], scores.astype(jnp.float32)[order]
    # Rows of one example are neighbours now. They are summed up first, in log2(B) passes of which
    # each doubles how many rows back a sum reaches: a scatter rounds after every row, in an order
    # that differs from run to run on accelerators.
    rows = jnp.arange(places.size)

    def reach_back(sums, distance):
        before = jnp.maximum(rows - distance, 0)
        is_same = (rows >= distance) & (places[before] == places)
        both = _sum(tuple(part[before] for part in sums), sums)
        return jax.tree.map(
            lambda new, own: jnp.where(is_same[:, None], new, own), both, sums
        ), None

    distances = 2 ** np.arange(max(places.size - 1, 0).bit_length())
    sums, _ = jax.lax.scan(reach_back, (scores, jnp.zeros_like(scores)), distances)
    old = tuple(leaf.at[places].get(mode="clip") for leaf in (values, compensation))
    is_last = jnp.ones(places.shape, bool).at[:-1].set(places[1:] != places[:-1])
    places = jnp.where(is_last, places, values.shape[0])
    return tuple(
        leaf.at[places].set(new, mode="drop")
        for leaf, new in zip((values, compensation), _sum(old, sums))
    )


def _sum(first: tuple[jax.Array, ...], second: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sum of two pairs, each a number and what it lacks by rounding; again such a pair.

    Source: Joldes, Muller, Popescu, Tight and rigorous error bounds for basic building blocks of
    double-word arithmetic, doi:10.1145/3121432, algorithm 6: an error of 3 * 2^-48 at most.
    """
    high, low = _two_sum(first[0], second[0])
    rest, rest_low = _two_sum(first[1], second[1])
    high, low = _two_sum(high, low + rest)
    return _two_sum(high, low + rest_low)


def _two_sum(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The float32 sum and its rounding error, exactly; 0 where the sum is not finite.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    total = first + second
    part = total - first
    error = (first - (total - part)) + (second - part)
    return total, jnp.where(jnp.isfinite(error), error, 0)
