"""Gradients of single examples, and their squared norms, from what a pass over all rows leaves."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._dots import GradDots, directed_with, like_rows, wide_zeros
from ghostjax._labels import by_row_label, counted, or_nan, positions_of
from ghostjax._late import Program, contracted
from ghostjax._loss import Arrays, Loss, check_reduction, check_scalar, trace_loss
from ghostjax.core import (
    DirectedSquares,
    Found,
    Labels,
    Regrouped,
    Squares,
    Weighted,
    mapped,
    on_this_mesh,
    square,
    typed_as,
    zeros_of,
)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward and a backward pass over all rows leave of them.

    Attributes:
      value, aux, conflicts: as in ``GradDots``.
      squares: by parameter, unscaled, [B]: where they did not come out of the pass, zeros.
      factors: by meeting that has to wait, what it kept and the cotangents of its outputs.
      found: the meetings.
    """

    loss: Loss
    arrays: Arrays
    labels: Labels | None
    value: Any
    aux: Any
    conflicts: Any
    squares: dict[int, Any]
    factors: dict[str, Any]
    found: Found

    @property
    def examples(self) -> int:
        return self.loss.num_rows if self.labels is None else self.labels.count

    def meetings(self) -> dict[str, Any]:
        """Those that wait."""
        return {key: self.found.meetings[key] for key in self.factors}

    def gradient(self, example: Any) -> list[Any]:
        """Of one example, whose number may be traced: the leaves of all uses that wait."""
        return self.loss.pull(self.arrays, self.by_meeting(example))

    def by_meeting(self, example: Any) -> dict[str, Any]:
        """The same at the operands of every meeting."""
        loss, labels = self.loss, self.labels
        factors = self.factors
        if loss.per_example:
            factors = jax.tree.map(lambda leaf: leaf[example], factors)
        is_own = jnp.arange(self.examples) == example
        if labels is not None and labels.ids.ndim == 1:
            is_own = labels.ids == example
        found = {}
        for key, meeting in self.meetings().items():
            by_weights = labels is not None or isinstance(meeting, Regrouped)
            number = is_own if by_weights else example

            def one(kept, cotangents, meeting=meeting, number=number):
                return meeting.gradient(number, kept, cotangents)

            with meeting.context():
                own = mapped(one, meeting, *on_this_mesh(factors[key]))
            found[key] = on_this_mesh(own)
        return found

    def dots(self, gradients: list[Any]) -> list[Any]:
        """Of all examples with K gradients, stacked: by parameter, [K, B] or [K, S]."""
        rows = jax.typeof(like_rows(jnp.zeros(self.loss.num_rows), self.arrays.batch))
        program = Program(self.loss, self.meetings(), rows)
        count = gradients[0].shape[0]
        dots, shared = contracted(program, self.arrays, self.factors, gradients, count, self.labels)
        return by_row_label(dots, shared, self.labels)[0]

    def squared_norms(self) -> Any:
        """A tree of the parameters, every leaf [B] or [S]."""
        waiting = sorted({path for m in self.meetings().values() for path in m.moving})

        def of_example(number):
            gradient = self.gradient(number)
            return {path: square(gradient[path]) for path in waiting}

        squares = dict(self.squares)
        later = jax.lax.map(of_example, jnp.arange(self.examples)) if waiting else {}
        for path, found in later.items():
            squares[path] = squares[path] + typed_as(found, jax.typeof(squares[path]))
        scale = self.loss.scale**2
        leaves = or_nan([squares[path] * scale for path in sorted(squares)], self.conflicts)
        return jax.tree.unflatten(self.loss.params, leaves)


def trace_rows(loss_fn: Callable[..., Any], args, kwargs, **options: Any) -> tuple[Loss, Arrays]:
    """``trace_loss``, where the loss may also return the losses of all rows, [N].

    Then every row's gradient is that of its own loss, as with their sum.
    """
    has_aux, apart = options["has_aux"], []

    def scalar(*args, **kwargs):
        output = loss_fn(*args, **kwargs)
        losses, *aux = output if has_aux else (output,)
        if getattr(losses, "ndim", None) == 1 and not options["per_example"]:
            apart.append(losses.shape)
            losses = jnp.sum(losses)
        return (losses, *aux) if has_aux else losses

    check_reduction(options["loss_reduction"])
    loss, arrays = trace_loss(scalar, args, kwargs, **options, check_loss=check_scalar)
    if not apart:
        return loss, arrays
    if apart[0] != (loss.num_rows,):
        raise ValueError(
            "loss_fn must return a scalar loss, or the losses of all rows, [N]. Found "
            f"{list(apart[0])} for {loss.num_rows} rows."
        )
    return dataclasses.replace(loss, loss_reduction="sum"), arrays


def row_pass(loss: Loss, arrays: Arrays, labels: Labels | None, *, at_once: bool) -> Pass:
    """One forward and one backward pass; with ``at_once``, norms come out of it where they can."""
    run = _walked(loss, arrays, labels)
    taps, slots, keys = _places(loss, arrays, labels, run, at_once=at_once)
    last: list[Found] = []

    def objective(taps, slots):
        outputs, emitted, _, conflicts, found = run(taps, slots, keys)
        last.append(found)
        value, aux = loss.outputs_of(outputs)
        return value, (aux, emitted, counted(conflicts, labels))

    (value, (aux, kept, conflicts)), (squares, cotangents) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(taps, slots)
    factors = {key: (kept[key], cotangents[key]) for key in kept}
    return Pass(loss, arrays, labels, value, aux, conflicts, squares, factors, last[0])


def directed_with_norms(
    loss: Loss, arrays: Arrays, direction: Any, directions: int | None, labels: Labels | None
) -> GradDots:
    """``directed``, and squared norms out of the same pass."""
    run = _walked(loss, arrays, labels)
    taps, slots, keys = _places(loss, arrays, labels, run, at_once=True)
    last: list[Found] = []

    def make(others, vectors, *args):
        squares, waiting = others
        both = {key: (own, waiting.get(key, [])) for key, own in vectors.items()}
        walk = DirectedSquares(squares, labels is not None, keys, *args, both, positions_of(labels))
        last.append(walk.found)
        return walk

    others = ({} if loss.per_example else taps), slots  # of one row, all meetings wait
    result, kept, (squares, cotangents) = directed_with(
        make, others, loss, arrays, direction, directions, labels
    )
    factors = {key: (kept[key], cotangents[key]) for key in kept}
    squares = taps | squares
    left = Pass(
        loss, arrays, labels, result.value, None, result.conflicts, squares, factors, last[0]
    )
    return dataclasses.replace(result, squared_norms=left.squared_norms())


def _walked(loss: Loss, arrays: Arrays, labels: Labels | None):
    """``run(taps, slots, keys) -> (outputs, emitted, specs, conflicts, found)``."""

    def run(taps, slots, keys):
        found = Found()

        def walked(slots, batch, marker):
            walk = Squares(
                loss,
                taps,
                labels is not None,
                slots=slots,
                at_once=keys,
                marker=marker,
                labels=positions_of(labels),
            )
            value, aux = loss.open(walk, arrays.params, batch, arrays.others)
            found.update(walk.found)
            return [value.primal, *(leaf.primal for leaf in aux)], *walk.results()

        if loss.per_example:
            walked = jax.vmap(walked)
        return *walked(slots, arrays.batch, jnp.zeros(loss.num_rows)), found

    return run


def _places(loss: Loss, arrays: Arrays, labels: Labels | None, run, *, at_once: bool):
    """Zeros [B] by parameter for norms that come out of the pass; zeros like the cotangents of the
    meetings that wait; and the meetings that do not, found by a walk in shapes."""
    first: list[Found] = []

    def shapes():
        *_, specs, _, found = run(None, None, frozenset())
        first.append(found)
        return specs

    specs = jax.eval_shape(shapes)
    (found,) = first
    in_rows = {key for key in specs if all(found.meetings[key].in_rows.values())}
    keys = frozenset()
    if at_once and labels is None and not loss.per_example:
        regrouped = {key for key in specs if isinstance(found.meetings[key], Regrouped)}
        keys = found.at_once() & (in_rows - regrouped)
    waiting = in_rows - keys
    slots = {key: jax.tree.map(zeros_of, spec) for key, spec in specs.items() if key in waiting}
    rows = loss.num_rows if labels is None else labels.count
    taps = {path: wide_zeros(leaf, (rows,)) for path, leaf in enumerate(arrays.params)}
    if labels is None:
        taps = {path: like_rows(tap, arrays.batch) for path, tap in taps.items()}
    return taps, slots, keys


def weighted_gradient(
    loss: Loss, arrays: Arrays, weights: jax.Array, labels: Labels | None
) -> list[Any]:
    """The gradient of the loss with every row's part times its weight: of rows [B], or of labels of
    positions [S]."""

    def walked(params, weights, batch, marker):
        walk = Weighted(loss, weights, marker=marker, labels=positions_of(labels))
        value, _ = loss.open(walk, params, batch, arrays.others)
        return value.primal

    def objective(params):
        if not loss.per_example:
            return walked(params, weights, arrays.batch, None)
        rows = jax.vmap(functools.partial(walked, params))
        values = rows(weights, arrays.batch, jnp.zeros(loss.num_rows))
        return jnp.mean(values) if loss.loss_reduction == "mean" else jnp.sum(values)

    return jax.grad(objective)(arrays.params)
