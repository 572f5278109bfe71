"""What is known of candidate rows, and policies that choose among them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ghostjax import directions
from ghostjax._aggregate import aggregate
from ghostjax._checks import batch_rows
from ghostjax._early import value_grad_and_dots
from ghostjax._late import value_and_dots_fn
from ghostjax._norms import squared_norms
from ghostjax._pairs import pairwise_dots
from ghostjax.selection.exclude import parted, paths_of, together
from ghostjax.selection.meshes import taken
from ghostjax.selection.weights import top_k


class Candidates:
    """The N rows that a policy chooses from; what it does not ask for is not computed.

    Gradients g_i are those of row i's own loss, without the parameters that ``exclude`` leaves out.

    Attributes:
      count: N.
      scores: [N]. Through the optimizer, the first-order decrease of the mean validation loss by
        row i's share of a step on k rows, < g_i, v > / k with v = ``directions.through_optimizer``
        at the mean gradient of all N; without, < g_i, gradient of the mean validation loss > / k.
        A row whose gradient is not finite has no finite score, and is left out of that mean, for
        one more forward and backward pass.
      losses: [N].
      squared_norms: [N], |g_i|^2, for one more forward and backward pass.
      gram: [N, N], < g_i, g_j >, for one more, and N products like that of a direction.
      key: that of the step.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], jax.Array],
        optimizer: optax.GradientTransformation,
        k: int,
        *,
        exclude: Any,
        through_optimizer: bool,
        remat: bool,
        args: tuple[Any, Any, Any, Any],
        key: Any,
    ):
        self._loss_fn, self._optimizer, self._k = loss_fn, optimizer, k
        self._through, self._remat = through_optimizer, remat
        self._params, self._state, self._batch, self._val_batch = args
        self._left, self._out = parted(self._params, exclude)
        self._key = key
        self.count = batch_rows(self._batch)

    @property
    def key(self) -> jax.Array:
        if self._key is None:
            raise ValueError("this policy draws at random: give the step a key=jax.random.key(...)")
        return self._key

    @functools.cached_property
    def losses(self) -> jax.Array:
        return self._row_losses(self._left, self._batch)

    @functools.cached_property
    def scores(self) -> jax.Array:
        val_grads = jax.grad(self._mean_loss)(self._left, self._val_batch)
        if not self._through:
            result = value_grad_and_dots(self._mean_loss)(
                self._left, self._batch, direction=val_grads
            )
            return result.total() / self._k
        pass_ = value_and_dots_fn(self._mean_loss, remat=self._remat)
        value, grads, dots = pass_(self._left, self._batch)
        value, grads = jax.lax.cond(
            functools.reduce(jnp.logical_and, map(_is_finite, jax.tree.leaves(grads))),
            lambda: (value, grads),
            lambda: self._of_rows(jnp.isfinite(dots.result(val_grads).total())),
        )
        direction = directions.through_optimizer(
            self._optimizer,
            self._state,
            self._params,
            self._whole(grads),
            self._whole(val_grads),
            value=value,
        )
        leaves = paths_of(direction)
        return dots.result({path: leaves[path] for path in self._left}).total() / self._k

    @functools.cached_property
    def squared_norms(self) -> jax.Array:
        return aggregate(squared_norms(self._row_losses)(self._left, self._batch))

    @functools.cached_property
    def gram(self) -> jax.Array:
        dots = pairwise_dots(self._row_losses)(self._left, self._batch)
        return sum(jax.tree.leaves(dots))

    def _row_losses(self, left: dict[str, Any], batch: Any) -> jax.Array:
        return row_losses(self._loss_fn, together(self._params, left | self._out), batch)

    def _mean_loss(self, left: dict[str, Any], batch: Any) -> jax.Array:
        return jnp.mean(self._row_losses(left, batch))

    def _of_rows(self, are_in: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The mean loss and its gradient, of the rows that are in [N]; others may be no number."""
        places = jnp.where(are_in, jnp.arange(self.count), jnp.argmax(are_in))
        batch = jax.tree.map(lambda leaf: taken(jnp.asarray(leaf), places), self._batch)

        def mean_loss(left):
            losses = self._row_losses(left, batch)
            share = are_in.astype(losses.dtype)
            return jnp.sum(share * losses) / jnp.maximum(jnp.sum(share), 1)

        return jax.value_and_grad(mean_loss)(self._left)

    def _whole(self, left: dict[str, Any]) -> Any:
        """With zeros for what is left out."""
        return together(self._params, left | jax.tree.map(jnp.zeros_like, self._out))


def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


Policy = Callable[[Candidates, int], jax.Array]


def by_score(candidates: Candidates, k: int) -> jax.Array:
    """The k rows with the largest scores, of those that are finite, a policy.

    Args:
      candidates: those of the step, see ``Candidates``.
      k: static, 1 <= k <= N.

    Returns:
      Weights [N], float32: N / k for the rows that are taken, 0 for the others.

    Raises:
      ValueError: k is not from 1 to N.

    >>> from types import SimpleNamespace
    >>> by_score(SimpleNamespace(scores=jnp.array([1.0, jnp.nan, 3.0])), 1)
    Array([0., 0., 3.], dtype=float32)
    """
    return top_k(_finite(candidates.scores), k)


def by_loss(candidates: Candidates, k: int) -> jax.Array:
    """The k rows with the smallest losses, a policy that needs one forward pass; as ``by_score``.

    >>> from types import SimpleNamespace
    >>> by_loss(SimpleNamespace(losses=jnp.array([1.0, 2.0, 3.0])), 1)
    Array([3., 0., 0.], dtype=float32)
    """
    return top_k(_finite(-candidates.losses), k)


def by_norm(candidates: Candidates, k: int) -> jax.Array:
    """The k rows with the largest gradients, of those that are finite, a policy; as ``by_score``.

    >>> from types import SimpleNamespace
    >>> by_norm(SimpleNamespace(squared_norms=jnp.array([1.0, 4.0, jnp.inf])), 1)
    Array([0., 3., 0.], dtype=float32)

    Source: GraNd scores, Paul et al., arXiv:2107.07075; Katharopoulos and Fleuret,
    arXiv:1803.00942.
    """
    return top_k(_finite(candidates.squared_norms), k)


def at_random(candidates: Candidates, k: int) -> jax.Array:
    """Any k rows, a policy that costs nothing; the step needs a key. As ``by_score``.

    >>> from types import SimpleNamespace
    >>> float(at_random(SimpleNamespace(key=jax.random.key(0), count=5), 2).sum())
    5.0
    """
    return top_k(jax.random.uniform(candidates.key, (candidates.count,)), k)


def _finite(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(scores), scores, jnp.nan)


def row_losses(loss_fn: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> jax.Array:
    """[N] of ``loss_fn``, checked."""
    losses, count = loss_fn(params, batch), batch_rows(batch)
    if getattr(losses, "shape", None) != (count,):
        found = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", losses)
        raise ValueError(
            f"loss_fn must return the losses of all rows, [{count}] of this batch. Found {found}."
        )
    return losses
