"""value_and_dots_fn: dots with directions that are known only after the backward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._checks import check_direction
from ghostjax._dots import GradDots, directed, finished, like_rows, wide_zeros
from ghostjax._face import on_loss
from ghostjax._labels import counted, positions_of
from ghostjax._loss import Arrays, Loss
from ghostjax.core import Harvest, Labels, Meeting, added_up, contract, varying_as, zeros_of


@dataclasses.dataclass(frozen=True, eq=False)
class HarvestedLoss:
    """What is static about a harvested loss: the loss, by key its meetings, and the rows' type."""

    loss: Loss
    meetings: dict[str, Meeting]
    rows: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LateDots:
    """Inner products of every row's gradient with any direction: ``dots(direction)``.

        dots[p][i] = < d l_i / d p , direction[p] >

    A pytree, which may leave ``jax.jit``. Its size is what late directions cost in memory: beside
    arguments and results of the step, the factors.

    Attributes:
      factors: by meeting, what its operands leave for the products, and the cotangents of its
        outputs; None with ``remat``, where both passes are made again instead.
      arrays: parameters, batch (with ``remat`` only) and constants of the loss.
      labels: by which the dots are added up.
      value, aux, grads, conflicts: as in ``GradDots``.
      harvested: what is static.
    """

    factors: dict[str, Any] | None
    arrays: Arrays
    value: jax.Array
    aux: Any
    grads: Any
    labels: Labels | None
    conflicts: Any
    harvested: HarvestedLoss = dataclasses.field(metadata={"static": True})

    def __call__(self, direction: Any) -> Any:
        """The dots: a tree of the parameters, every leaf [B] in float32 (float64 for float64).

        Args:
          direction: a tree like the parameters; or with a leading axis K on every leaf, for K
            directions, and then the dots are [K, B]. It is a pure function, for ``jax.vmap`` too.

        Raises:
          ValueError: the direction does not fit.
        """
        return self.result(direction).dots

    def result(self, direction: Any) -> GradDots:
        """What ``value_grad_and_dots`` returns: the dots, ``total()``, the parts of no row."""
        loss = self.harvested.loss
        params = jax.tree.unflatten(loss.params, self.arrays.params)
        directions = check_direction(params, direction, stacked=True)
        if self.factors is None:
            return directed(loss, self.arrays, direction, directions, self.labels)
        vectors = jax.tree.leaves(direction)
        dots, shared = contracted(
            self.harvested, self.arrays, self.factors, vectors, directions, self.labels
        )
        grads = jax.tree.leaves(self.grads)
        return finished(
            loss, self.value, self.aux, grads, dots, shared, self.labels, self.conflicts
        )


def contracted(
    harvested: HarvestedLoss,
    arrays: Arrays,
    factors: dict[str, Any],
    vectors: list[Any],
    directions: int | None,
    labels: Labels | None,
) -> tuple[list[Any], list[Any]]:
    """By parameter, the sums of all meetings' factors with directions, those of rows (or labels of
    positions) and those of nobody; ``directions`` is K where ``vectors`` are stacked."""
    loss = harvested.loss
    moved = loss.push(arrays, vectors, stacked=directions is not None)
    leading = () if directions is None else (directions,)
    positions = positions_of(labels)
    size = loss.num_rows if positions is None else positions.count
    dots = [wide_zeros(leaf, (*leading, size)) for leaf in arrays.params]
    if positions is None:
        dots = [varying_as(leaf, harvested.rows) for leaf in dots]
    shared = [wide_zeros(leaf, leading) for leaf in arrays.params]
    for key, (kept, cotangents) in factors.items():
        meeting = harvested.meetings[key]

        def one(kept, cotangents, meeting=meeting, vectors=moved[key]):
            return contract(meeting, kept, cotangents, vectors, directions)

        if loss.per_example:
            one = jax.vmap(one, out_axes=-1)
        for path, sums in one(kept, cotangents).items():
            for total, part in zip((dots, shared), meeting.parted(path, sums)):
                if part is not None:
                    # Inside shard_map, every meeting's own part is added up over the devices.
                    kind = jax.typeof(total[path])
                    total[path] = total[path] + added_up(part.astype(kind.dtype), kind)
    return dots, shared


def value_and_dots_fn(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
    coupled: str = "error",
    remat: bool = False,
) -> Callable[..., tuple[Any, Any, LateDots]]:
    """``jax.value_and_grad``, and a function that gives the dots when the direction is known.

        value, grads, dots = value_and_dots_fn(loss_fn)(params, batch)
        dots(direction)[p][i] = < d l_i / d p , direction[p] >

    One forward and one backward pass, also of loops and of what ``jax.checkpoint`` makes again.
    For directions that depend on the gradient itself: through the optimizer, at the midpoint of the
    update. Where the direction is known before, ``value_grad_and_dots`` needs less memory.

    Args:
      loss_fn, argnums, batch_argnums, has_aux, per_example, loss_reduction, coupled: as for
        ``value_grad_and_dots``.
      remat: keep no factors; ``dots(direction)`` makes both passes again.

    Returns:
      ``fn(*args, labels=None, num_labels=None, **kwargs) -> (value, grads, dots)``, with labels as
      for ``value_grad_and_dots``, and with ``(value, aux)`` in place of ``value``
      with ``has_aux``; ``dots`` is a ``LateDots``. Use all of it in one ``jax.jit``.

    Guarantees: value, aux and grads are computed by the operations of ``jax.value_and_grad``.

    Raises:
      What ``value_grad_and_dots`` raises, of directions by ``dots(direction)``.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.square(x @ w) / 2)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> value, grads, dots = value_and_dots_fn(loss_fn)(w, x)
    >>> value, grads, dots(grads / 2)
    (Array(2.5, dtype=float32), Array([2., 3.], dtype=float32), Array([ 1., 12.], dtype=float32))
    """

    def run(loss: Loss, arrays: Arrays, labels: Labels | None) -> tuple[Any, Any, LateDots]:
        dots = (_without_factors if remat else with_factors)(loss, arrays, labels)
        return (dots.value, dots.aux) if has_aux else dots.value, dots.grads, dots

    return on_loss(
        loss_fn,
        run,
        argnums=argnums,
        batch_argnums=batch_argnums,
        has_aux=has_aux,
        per_example=per_example,
        loss_reduction=loss_reduction,
        coupled=coupled,
    )


def _without_factors(loss: Loss, arrays: Arrays, labels: Labels | None) -> LateDots:
    def objective(params):
        return loss.outputs_of(loss.evaluate(params, arrays))

    (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(arrays.params)
    grads = jax.tree.unflatten(loss.params, grads)
    return LateDots(None, arrays, value, aux, grads, labels, None, HarvestedLoss(loss, {}))


def with_factors(loss: Loss, arrays: Arrays, labels: Labels | None) -> LateDots:
    run, harvested = harvesting(loss, arrays, positions_of(labels))
    slots = empty_slots(run, arrays.params)

    def objective(params, slots):
        outputs, emitted, _, conflicts = run(params, slots)
        value, aux = loss.outputs_of(outputs)
        return value, (aux, emitted, counted(conflicts, labels))

    (value, (aux, kept, conflicts)), (grads, cotangents) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(arrays.params, slots)
    factors = {key: (kept[key], cotangents[key]) for key in kept}
    return LateDots(
        factors,
        dataclasses.replace(arrays, batch=[]),
        value,
        aux,
        jax.tree.unflatten(loss.params, grads),
        labels,
        conflicts,
        harvested,
    )


def harvesting(loss: Loss, arrays: Arrays, labels: Labels | None = None):
    """``run(params, slots) -> (outputs, kept, specs, conflicts)``, and what it fills in."""
    rows = like_rows(jnp.zeros(loss.num_rows), arrays.batch)
    harvested = HarvestedLoss(loss, {}, jax.typeof(rows))

    def run(params, slots):
        def walked(slots, batch, marker):
            walk = Harvest(loss.names, loss.walked_rows, marker, slots, labels)
            value, aux = loss.open(walk, params, batch, arrays.others)
            harvested.meetings.update(walk.meetings)
            return [value.primal, *(leaf.primal for leaf in aux)], *walk.results()

        if loss.per_example:
            walked = jax.vmap(walked)
        return walked(slots, arrays.batch, jnp.zeros(loss.num_rows))

    return run, harvested


def empty_slots(run, params) -> dict[str, Any]:
    """Zeros for the cotangents of all meetings, found by a walk in shapes."""
    _, _, specs, _ = jax.eval_shape(lambda params: run(params, None), params)
    return jax.tree.map(zeros_of, specs)
