"""Gradients of single examples, and their squared norms, from what a pass over all rows leaves."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from ghostjax._dots import GradDots, directed_with, like_rows, wide_zeros
from ghostjax._labels import by_row_label, counted, or_nan, positions_of
from ghostjax._late import HarvestedLoss, contracted
from ghostjax._loss import Arrays, Loss, trace_loss
from ghostjax.core import (
    Clipped,
    DirectedSquares,
    Found,
    Labels,
    NormRoute,
    Regrouped,
    RowMeeting,
    Rows,
    Squares,
    in_context,
    map_parts,
    mapped,
    pair_squares,
    route_of_waiting,
    splits_rows,
    square,
    typed_as,
    varying,
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

    def gradient(self, example: Any, keys: Collection[str] | None = None) -> list[Any]:
        """Of one example, whose number may be traced: the leaves of all uses that wait, or of the
        meetings ``keys``."""
        keys = self.factors.keys() if keys is None else keys
        return self.loss.pull(self.arrays, self.by_meeting(example, keys))

    def by_meeting(self, example: Any, keys: Collection[str]) -> dict[str, Any]:
        """The same at the operands of every meeting."""
        loss, labels = self.loss, self.labels
        factors = self.factors
        if loss.per_example:
            factors = jax.tree.map(lambda leaf: leaf[example], factors)
        is_own = jnp.arange(self.examples) == example
        if labels is not None and labels.ids.ndim == 1:
            is_own = labels.ids == example
        found = {}
        for key in keys:
            meeting = self.found.meetings[key]
            by_weights = labels is not None or isinstance(meeting, Regrouped)
            number = is_own if by_weights else example

            def every(number, factors, meeting=meeting):
                return mapped(functools.partial(meeting.gradient, number), meeting, *factors)

            found[key] = in_context(meeting.context(), every, number, factors[key])
        return found

    def dots(self, gradients: list[Any], count: int) -> list[Any]:
        """Of all examples with K = ``count`` gradients, stacked: by parameter [K, B] or [K, S]."""
        rows = jax.typeof(like_rows(jnp.zeros(self.loss.num_rows), self.arrays.batch))
        own = HarvestedLoss(self.loss, self.meetings(), rows)
        dots, shared = contracted(own, self.arrays, self.factors, gradients, count, self.labels)
        return by_row_label(dots, shared, self.labels)[0]

    def uses(self) -> dict[int, list[str]]:
        """By parameter, the meetings that wait."""
        found: dict[int, list[str]] = {}
        for key, meeting in self.meetings().items():
            for path in meeting.moving:
                found.setdefault(path, []).append(key)
        return found

    def route(self, keys: Collection[str]) -> NormRoute:
        """Of a parameter's meetings that wait."""
        meetings = [self.found.meetings[key] for key in keys]
        return route_of_waiting(meetings, [self.factors[key][1] for key in keys])

    def squared_norms(self) -> Any:
        """A tree of the parameters, every leaf [B] or [S]."""
        uses = self.uses()
        over_pairs = {path for path, keys in uses.items() if self.route(keys) is NormRoute.PAIRS}
        cut = {
            path
            for path, keys in uses.items()
            if path not in over_pairs and all(map(self._is_cut, keys))
        }
        squares, later = dict(self.squares), {}
        for paths in (cut, uses.keys() - over_pairs - cut):
            keys = {key for path in paths for key in uses[path]}
            later |= self._row_by_row(paths, sorted(keys), is_cut=paths is cut)
        for path in over_pairs:
            later[path] = pair_squares([self._factors(key) for key in uses[path]])
        for path, found in later.items():
            squares[path] = squares[path] + typed_as(found, jax.typeof(squares[path]))
        scale = self.loss.scale**2
        leaves = or_nan([squares[path] * scale for path in sorted(squares)], self.conflicts)
        return jax.tree.unflatten(self.loss.params, leaves)

    def _is_cut(self, key: str) -> bool:
        """Whether a row's gradient needs no more of a meeting's factors than what these have of
        that row."""
        meeting = self.found.meetings[key]
        if self.labels is not None or not isinstance(meeting, RowMeeting):
            return False  # rows that moved, or a rule that adds them up, are not in place
        leaves = jax.tree.leaves(self.factors[key])
        return splits_rows(*leaves) if self.loss.per_example else meeting.is_cut(leaves)

    def _row_by_row(
        self, paths: Collection[int], keys: Collection[str], is_cut: bool
    ) -> dict[int, Any]:
        """Squared norms, [B] or [S], of parameters whose uses are those meetings."""

        def of_example(number, factors):
            gradient = dataclasses.replace(self, factors=factors).gradient(number, keys)
            return {path: square(gradient[path]) for path in paths}

        factors = {key: self.factors[key] for key in keys}
        if not keys:
            return {}
        if not is_cut:
            return jax.lax.map(lambda n: of_example(n, factors), jnp.arange(self.examples))
        leaves, treedef = jax.tree.flatten(factors)
        places = [Rows(0)] * len(leaves)
        if not self.loss.per_example:
            places = treedef.flatten_up_to({key: self._places(key) for key in keys})
        return map_parts(lambda parts: of_example(0, treedef.unflatten(parts)), leaves, places)

    def _places(self, key: str) -> Any:
        """Where the rows of a meeting's factors are."""
        meeting, (kept, cotangents) = self.found.meetings[key], self.factors[key]
        inside = meeting.outputs[meeting.differentiable[0]].shape
        return meeting.places(kept, cotangents[0].ndim - len(inside))

    def _factors(self, key: str):
        meeting, ((arrays, _), cotangents) = self.found.meetings[key], self.factors[key]
        return in_context(meeting.context(), meeting.use.factors, arrays, *cotangents)


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

    loss, arrays = trace_loss(scalar, args, kwargs, **options)
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
    check_devices(arrays)
    run = _walked(loss, arrays, labels)
    taps, slots, keys, _ = _first_walk(loss, arrays, labels, run, at_once=at_once)
    last: list[Found] = []

    def objective(taps, slots):
        outputs, emitted, _, conflicts, found = run(arrays.params, taps, slots, keys)
        last.append(found)
        value, aux = loss.outputs_of(outputs)
        return value, (aux, emitted, counted(conflicts, labels))

    (value, (aux, kept, conflicts)), (squares, cotangents) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(taps, slots)
    factors = {key: (kept[key], cotangents[key]) for key in kept}
    return Pass(loss, arrays, labels, value, aux, conflicts, squares, factors, last[0])


def clipping_pass(
    loss: Loss, arrays: Arrays, labels: Labels | None, *, at_once: bool
) -> tuple[Pass, Callable[[jax.Array], list[Any]]]:
    """``row_pass``; and a second backward pass, as a function of weights.

    That gives the gradient of the loss with every row's part times its weight: of rows [B], or of
    labels of positions [S]. Rows of weight 0 may hold what is no number.
    """
    check_devices(arrays)
    run = _walked(loss, arrays, labels, Clipped)
    taps, slots, keys, found = _first_walk(loss, arrays, labels, run, at_once=at_once)
    check_in_rows(loss, found)
    last: list[Found] = []

    def objective(params, taps, slots):
        outputs, emitted, _, conflicts, found = run(params, taps, slots, keys)
        last.append(found)
        value, aux = loss.outputs_of(outputs)
        kept = {key: own for key, own in emitted.items() if key in slots}
        ports = {key: own for key, own in emitted.items() if key not in slots}
        return (value, ports), (aux, kept, counted(conflicts, labels))

    (value, ports), pulled, (aux, kept, conflicts) = jax.vjp(
        objective, arrays.params, taps, slots, has_aux=True
    )
    seed = jnp.ones_like(value)
    _, squares, cotangents = pulled((seed, jax.tree.map(jnp.zeros_like, ports)))
    factors = {key: (kept[key], cotangents[key]) for key in kept}
    left = Pass(loss, arrays, labels, value, aux, conflicts, squares, factors, last[0])

    def weighted(weights):
        # Else the compiler would keep for the second pass what the first one has computed.
        pull_again, again, weights = jax.lax.optimization_barrier((pulled, seed, weights))
        # XLA's CPU backend drops barriers, and would do all of the second pass early that needs no
        # weights: the seed says that they are needed. They are not negative, which it cannot know.
        again = jnp.where(jnp.any(weights < -1), jnp.zeros_like(again), again)

        def given(port):
            loops = [1] * (port.ndim - 1)  # before the rows, but where these are vectorized
            own = weights.reshape((-1, *loops) if loss.per_example else (*loops, -1))
            own = jnp.broadcast_to(own.astype(port.dtype), port.shape)
            return typed_as(own, jax.typeof(port))

        return pull_again((again, jax.tree.map(given, ports)))[0]

    return left, weighted


def check_devices(arrays: Arrays) -> None:
    """An error where JAX adds up by itself what devices give, or cannot take a row from them."""
    kinds = [jax.typeof(leaf) for leaf in arrays.batch]
    if any(map(varying, kinds)):
        raise NotImplementedError(
            "gradients of single rows are not made inside of a shard_map that checks over which "
            "axes values vary. Pass check_vma=False to it, and add up with jax.lax.psum what is of "
            "all devices; or use jax.jit with sharded arguments instead."
        )


def check_in_rows(loss: Loss, found: Found) -> None:
    """An error where a part of the gradient belongs to no row."""
    faults = [
        f"  {loss.names[path]} in {found.operations.get(key, 'the loss')}"
        for key, meeting in found.meetings.items()
        for path, in_rows in meeting.in_rows.items()
        if not in_rows
    ]
    if faults:
        raise ValueError(
            "clipped gradients are those of rows, but a part of the loss belongs to no row:\n"
            + "\n".join(faults)
            + "\nLeave it out of the loss and add its gradient afterwards, weight decay by "
            "optax.add_decayed_weights."
        )


def directed_with_norms(
    loss: Loss, arrays: Arrays, direction: Any, directions: int | None, labels: Labels | None
) -> GradDots:
    """``directed``, and squared norms out of the same pass."""
    check_devices(arrays)
    run = _walked(loss, arrays, labels)
    taps, slots, keys, _ = _first_walk(loss, arrays, labels, run, at_once=True)
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


def _walked(loss: Loss, arrays: Arrays, labels: Labels | None, kind=Squares):
    """``run(params, taps, slots, keys) -> (outputs, emitted, specs, conflicts, found)``."""

    def run(params, taps, slots, keys):
        found = Found()

        def walked(slots, batch, marker):
            walk = kind(
                loss,
                taps,
                labels is not None,
                slots=slots,
                at_once=keys,
                marker=marker,
                labels=positions_of(labels),
            )
            value, aux = loss.open(walk, params, batch, arrays.others)
            found.update(walk.found)
            return [value.primal, *(leaf.primal for leaf in aux)], *walk.results()

        positions = positions_of(labels)
        marker = jnp.zeros(loss.num_rows if positions is None else positions.count)
        if positions is None:
            marker = like_rows(marker, arrays.batch)
        if loss.per_example:
            walked = jax.vmap(walked)
        return *walked(slots, arrays.batch, marker), found

    return run


def _first_walk(loss: Loss, arrays: Arrays, labels: Labels | None, run, *, at_once: bool):
    """Zeros [B] by parameter for norms that come out of the pass; zeros like the cotangents of the
    meetings that wait; the meetings that do not; and all, found by a walk in shapes."""
    first: list[Found] = []

    def shapes():
        *_, specs, _, found = run(arrays.params, None, None, frozenset())
        first.append(found)
        return specs

    specs = jax.eval_shape(shapes)
    (found,) = first
    in_rows = {key for key in specs if all(found.meetings[key].in_rows.values())}
    keys = keys_at_once(loss, labels, found) & in_rows if at_once else frozenset()
    waiting = in_rows - keys
    slots = {key: jax.tree.map(zeros_of, spec) for key, spec in specs.items() if key in waiting}
    rows = loss.num_rows if labels is None else labels.count
    taps = {path: wide_zeros(leaf, (rows,)) for path, leaf in enumerate(arrays.params)}
    if labels is None:
        taps = {path: like_rows(tap, arrays.batch) for path, tap in taps.items()}
    return taps, slots, keys, found


def keys_at_once(loss: Loss, labels: Labels | None, found: Found) -> frozenset[str]:
    """The meetings whose norms come out of the pass itself, if they are those of rows."""
    if labels is not None or loss.per_example:
        return frozenset()
    return frozenset(
        key for key in found.at_once() if not isinstance(found.meetings[key], Regrouped)
    )
