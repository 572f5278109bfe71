"""A loss function with its parameters and batch, as the walks take it: a jaxpr and its arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ghostjax._checks import batch_rows, check_argnums, check_parameters
from ghostjax._jaxprs import live_equations
from ghostjax._modules import opened
from ghostjax.core import Push, Rows, Track, Value, Walk, Where, marked_where_unused, typed_as


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """What is static about a traced loss.

    Attributes:
      jaxpr: of leaves of the parameters, leaves of the batch, and the other arrays.
      names: of the parameters' leaves, for messages.
      num_rows: B.
      per_example: whether the jaxpr is that of one row.
      params: tree of the parameters, a tuple of those of several ``argnums``.
      batch_leaves: how many leaves the batch has.
      outputs: tree of (loss, aux).
      loss_reduction: "mean" or "sum".
      shares: whether rows may be mixed, so that dots are shares.
      named_meetings: by the name of a jitted function, the kind of meeting that its calls are.
    """

    jaxpr: core.Jaxpr
    names: list[str]
    num_rows: int
    per_example: bool
    params: Any
    batch_leaves: int
    outputs: Any
    loss_reduction: str
    named_meetings: dict[str, Any]
    shares: bool = False

    @property
    def walked_rows(self) -> int | None:
        """The number of rows in the jaxpr, None if it is that of one row."""
        return None if self.per_example else self.num_rows

    def open(self, walk: Walk, params: list, batch: list, others: list, vectors: Any = None):
        """The loss and the leaves of aux, as values of the walk.

        ``others`` are the constants and the other arrays; ``vectors`` the direction, if known.
        """
        walk.shares = self.shares
        count = len(self.jaxpr.constvars)
        vectors = [None] * len(params) if vectors is None else vectors
        operands = [
            Value(leaf, {number: vector}, direct=True, axes=tuple(range(jnp.ndim(leaf))))
            for number, (leaf, vector) in enumerate(zip(params, vectors, strict=True))
        ]
        operands += [walk.data(leaf, False, self._where(leaf, walk)) for leaf in batch]
        operands += [Value(leaf) for leaf in others[count:]]
        loss, *aux = walk.open(self.jaxpr, [Value(const) for const in others[:count]], operands)
        if loss.tangents:
            loss = walk.promote(loss, Where())
        return loss, aux

    def _where(self, leaf: Any, walk: Walk) -> Where:
        """Rows lie along the first axis of the batch; positions, if labels have them, along the
        second of those arrays whose first two are those of the labels."""
        if self.per_example:
            return Where()
        has_positions = walk.labels and leaf.shape[:2] == walk.labels.ids.shape
        return Where(Track(Rows(0)), (Track(Rows(1)),) if has_positions else ())

    def push(self, arrays: "Arrays", vectors: list[Any], stacked: bool) -> dict[str, Any]:
        """By meeting, the direction at its operands."""
        walk = Push(self.names, self.walked_rows, stacked, self.named_meetings)
        batch = [None] * self.batch_leaves
        self.open(walk, arrays.params, batch, arrays.others, vectors)
        return walk.emitted

    def pull(self, arrays: "Arrays", gradients: dict[str, Any]) -> list[Any]:
        """The transpose of ``push``: leaves of the parameters, of gradients at the operands of some
        meetings."""

        def push(vectors):
            found = self.push(arrays, vectors, False)
            return {key: found[key] for key in gradients}

        pushed, pulled = jax.vjp(push, arrays.params)
        (leaves,) = pulled(
            jax.tree.map(lambda own, like: typed_as(own, jax.typeof(like)), gradients, pushed)
        )
        return leaves

    def evaluate(self, params: list, arrays: "Arrays") -> list:
        """The loss (of every row, where the jaxpr is that of one) and the leaves of aux."""
        count = len(self.jaxpr.constvars)
        consts, others = arrays.others[:count], arrays.others[count:]
        function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, consts))

        def evaluated(batch):
            return function(*params, *batch, *others)

        return (jax.vmap(evaluated) if self.per_example else evaluated)(arrays.batch)

    def outputs_of(self, leaves: list) -> tuple[jax.Array, Any]:
        """(scalar loss, aux) of what the jaxpr gives."""
        loss, aux = jax.tree.unflatten(self.outputs, leaves)
        if self.per_example:
            loss = jnp.mean(loss) if self.loss_reduction == "mean" else jnp.sum(loss)
        return loss, aux

    @property
    def scale(self) -> float:
        """What a row's share of the loss has to be multiplied with."""
        return float(self.num_rows) if self.loss_reduction == "mean" else 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays that go with a ``Loss``: leaves of parameters and batch, and all others."""

    params: list[Any]
    batch: list[Any]
    others: list[Any]


def check_scalar(loss: Any) -> None:
    if not hasattr(loss, "shape") or loss.shape != ():
        raise ValueError(
            "loss_fn must return a scalar loss (with per_example, the scalar loss of one row; with "
            "has_aux, a pair of it and aux). "
            f"Found {jax.tree.map(lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', loss)}."
        )


def trace_loss(
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    argnums: int | Sequence[int],
    batch_argnums: int | Sequence[int],
    has_aux: bool,
    per_example: bool,
    loss_reduction: str,
    check_loss: Callable[[Any], None] = check_scalar,
    named_meetings: dict[str, Any] | None = None,
    coupled: str = "error",
) -> tuple[Loss, Arrays]:
    """Traces ``loss_fn`` once, with every array among its arguments an input."""
    numbers, batch_numbers = check_argnums(argnums, batch_argnums, len(args))
    split = [opened(args[number]) for number in numbers]
    params = tuple(found for found, _ in split)
    batch = tuple(args[number] for number in batch_numbers)
    named = params[0] if isinstance(argnums, int) else params
    check_parameters(named)
    num_rows = batch_rows(batch[0] if isinstance(batch_argnums, int) else batch)
    paths = jax.tree_util.tree_leaves_with_path(named)
    names = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
    rest = {
        number: arg
        for number, arg in enumerate(args)
        if number not in numbers and number not in batch_numbers
    }
    leaves, treedef = jax.tree.flatten((rest, kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def call(params, batch, arrays):
        """``loss_fn`` with the arguments put back in their places: (scalar, aux)."""
        remaining = iter(arrays)
        filled = [next(remaining) if _is_array(leaf) else leaf for leaf in leaves]
        full, kwargs = jax.tree.unflatten(treedef, filled)
        closed = [close(found) for (_, close), found in zip(split, params)]
        full |= {number: whole for number, (whole, _) in zip(numbers, closed)}
        full |= dict(zip(batch_numbers, batch))
        output = loss_fn(*(full[number] for number in range(len(args))), **kwargs)
        for _, check_state in closed:
            check_state()
        if has_aux and not (isinstance(output, (tuple, list)) and len(output) == 2):
            raise TypeError(
                "with has_aux, loss_fn must return a pair (loss, aux). Found "
                f"{jax.tree.structure(output)}."
            )
        return output if has_aux else (output, None)

    seen = batch
    if per_example:
        seen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    closed, shapes = jax.make_jaxpr(call, return_shape=True)(params, seen, arrays)
    check_loss(shapes[0])
    # What nothing needs is not walked: it may mix rows, and its parameters are unused.
    outputs = len(closed.jaxpr.outvars)
    needed, _ = live_equations(closed.jaxpr, [True] * outputs)
    loss = Loss(
        jaxpr=marked_where_unused(
            closed.jaxpr.replace(eqns=needed), [True] + [False] * (outputs - 1)
        ),
        names=names,
        num_rows=num_rows,
        per_example=per_example,
        params=jax.tree.structure(named),
        batch_leaves=len(jax.tree.leaves(batch)),
        outputs=jax.tree.structure(shapes),
        loss_reduction=loss_reduction,
        named_meetings=named_meetings or {},
        shares=coupled == "share",
    )
    return loss, Arrays(jax.tree.leaves(params), jax.tree.leaves(batch), [*closed.consts, *arrays])


def check_coupled(coupled: str) -> None:
    if coupled not in ("error", "share"):
        raise ValueError(f'coupled must be "error" or "share", got {coupled!r}.')


def check_reduction(loss_reduction: str) -> None:
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}.')


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
