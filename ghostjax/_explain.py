"""explain: where parameters meet data, by which route dots and norms come, and at what cost."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ghostjax._explained_memory import device_bytes, memory_of
from ghostjax._explained_norms import norms_of
from ghostjax._explanation import Explanation, Use
from ghostjax._flops import equation_flops, flops, flops_after, rounds_unknown
from ghostjax._jaxprs import describe_operation
from ghostjax._late import harvesting
from ghostjax._loss import Arrays, Loss, check_coupled, check_reduction, trace_loss
from ghostjax._step_memory import StepMemory
from ghostjax.core import Meeting, Regrouped, Rows, in_context

_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)


def explain(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
    coupled: str = "error",
    directions: int | None = None,
    budget: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Callable[..., Explanation]:
    """Where parameters meet data, how dots and norms are made, and what that costs.

        print(explain(loss_fn)(params, batch))

    From shapes alone: nothing is run or compiled.

    Args:
      loss_fn, argnums, batch_argnums, has_aux, per_example, loss_reduction, coupled: as for
        ``value_grad_and_dots``.
      directions: K, where the direction is to have a leading axis of K directions; None where it
        has none. Static.
      budget: how many bytes a device has; by default what the device says, which a CPU does not.
      optimizer: whose state is on the device, too: ``optimizer.init`` of what ``argnums`` names, in
        shapes, split over the mesh like the parameters. None: no state is counted.

    Returns:
      ``fn(*args, **kwargs) -> Explanation``, with arguments as for ``loss_fn``: arrays, or
      ``jax.ShapeDtypeStruct`` in the place of any array. A ``NamedSharding`` of either tells how
      they are to be split over a mesh. Where the step takes more than the budget, the explanation
      says so, and what to change.

    Guarantees: routes are told by the rules that ``value_grad_and_dots``, ``value_and_dots_fn``,
    ``squared_norms`` and ``value_and_clipped_grad`` ask, for the backend that JAX uses here. FLOPs
    are counted in the programs that they run: products exactly, everything else as one for every
    number (XLA's convention). Where norms or clipped gradients are refused, it is told why.

    Raises:
      What ``value_grad_and_dots`` raises for the loss and its arguments.
      ValueError: ``directions`` or ``budget`` is less than one, or arguments are on several meshes.
      TypeError: ``optimizer`` is no ``optax.GradientTransformation``.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.square(x @ w) / 2)
    >>> vector, matrix = jax.ShapeDtypeStruct((512,), "float32"), jnp.zeros((32, 512))
    >>> explanation = explain(loss_fn)(vector, matrix)
    >>> [use] = explanation.uses
    >>> use.parameter, str(use.route), use.times, use.flops, use.late_bytes
    ('params', 'tangent', 1, 32864, 65664)
    >>> explanation.plain_flops // 1000, round(explanation.cost, 2)
    (65, 1.5)
    >>> [norm] = explanation.norms.parameters
    >>> norm.parameter, str(norm.route), norm.bytes, round(explanation.clipped_cost, 2)
    ('params', 'gram', 0, 1.75)
    """
    check_reduction(loss_reduction)
    check_coupled(coupled)
    if directions is not None and operator.index(directions) < 1:
        raise ValueError(
            f"directions must be the number of stacked directions, at least 1, or None. Got "
            f"{directions}."
        )

    if budget is not None and budget < 1:
        raise ValueError(f"budget must be a positive number of bytes, got {budget}.")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {type(optimizer).__name__}. "
            "Give the transformation, such as optax.adamw(1e-3), and not its state."
        )

    @functools.wraps(loss_fn)
    def fn(*args: Any, **kwargs: Any) -> Explanation:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, _ARRAYS)]
        found: list[Loss] = []

        def opened(arrays):
            remaining = iter(arrays)
            filled = [next(remaining) if isinstance(leaf, _ARRAYS) else leaf for leaf in leaves]
            loss, arrays = trace_loss(
                loss_fn,
                *jax.tree.unflatten(treedef, filled),
                argnums=argnums,
                batch_argnums=batch_argnums,
                has_aux=has_aux,
                per_example=per_example,
                loss_reduction=loss_reduction,
                coupled=coupled,
            )
            found.append(loss)
            return arrays

        arrays = jax.eval_shape(opened, given)
        memory = memory_of(lambda leaves: (opened(leaves), found[-1]), given, directions, optimizer)
        return _explained(found[0], arrays, directions, memory, budget or device_bytes())

    return fn


def _explained(
    loss: Loss, arrays: Arrays, directions: int | None, memory: StepMemory, budget: int | None
) -> Explanation:
    def plain(arrays):
        def objective(params):
            return loss.outputs_of(loss.evaluate(params, arrays))

        return jax.value_and_grad(objective, has_aux=True)(arrays.params)

    def push(vectors, arrays):
        return loss.push(arrays, vectors, directions is not None)

    leading = () if directions is None else (directions,)
    vectors = [jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype) for leaf in arrays.params]
    step = jax.make_jaxpr(plain)(arrays).jaxpr
    pushed, moved = jax.make_jaxpr(push, return_shape=True)(vectors, arrays)
    meetings, factors = _harvested(loss, arrays)
    uses = [
        use
        for key, own in factors.items()
        if own[1]  # of a comparison, say, nothing has a derivative
        for use in _uses(loss, meetings[key], own, moved[key], directions)
    ]
    used = {use.parameter for use in uses}
    return Explanation(
        uses=tuple(sorted(uses, key=lambda use: loss.names.index(use.parameter))),
        unused=tuple(name for name in loss.names if name not in used),
        num_rows=loss.num_rows,
        directions=directions,
        backend=jax.default_backend(),
        plain_flops=flops(step),
        push_flops=flops_after(pushed.jaxpr, pushed.jaxpr.invars[: len(vectors)]),
        uncounted=tuple(sorted({describe_operation(eqn) for eqn in rounds_unknown(step)})),
        norms=norms_of(loss, arrays),
        memory=memory,
        budget=budget,
    )


def _harvested(loss: Loss, arrays: Arrays) -> tuple[dict[str, Meeting], dict[str, Any]]:
    """By key the meetings, and (operands, what the backward pass leaves for late directions)."""
    meetings: dict[str, Meeting] = {}

    def walked(arrays):
        run, program = harvesting(loss, arrays)
        _, kept, cotangents, _ = run(arrays.params, None)
        meetings.update(program.meetings)
        return {key: (kept[key], cotangents[key]) for key in kept}

    return meetings, jax.eval_shape(walked, arrays)


def _uses(loss: Loss, meeting: Meeting, factors, vectors, directions) -> list[Use]:
    """By parameter of a meeting, its share of it: equal shares, that add up."""
    cotangent = factors[1][0]
    rows = 1 if loss.per_example else 0  # an axis of B, before those of the loops
    loops = cotangent.ndim - rows - len(meeting.outputs[meeting.differentiable[0]].shape)
    times = math.prod(cotangent.shape[rows : rows + loops])

    def inside(leaf, before):
        return jax.ShapeDtypeStruct(
            (*leaf.shape[:before], *leaf.shape[before + loops :]), leaf.dtype
        )

    def extra(route, late):
        taken = None if late else meeting.takes_gradient(route)

        def sums(kept, cotangents, vectors):
            if taken is not None:
                return meeting.sums_and_gradient(kept, vectors, cotangents, stacked)
            return meeting.sums(kept, vectors, cotangents, stacked, route)

        stacked = directions is not None

        def own(*trees):
            return in_context(meeting.context(), sums, *trees)

        each = jax.vmap(own, in_axes=(0, 0, None)) if loss.per_example else own
        kept, cotangents = jax.tree.map(lambda leaf: inside(leaf, rows), factors)
        if meeting.keeps_row_gradients:
            cotangents = [meeting.outputs[k] for k in meeting.differentiable]
        moved = jax.tree.map(lambda leaf: inside(leaf, 0), vectors)
        found = flops(jax.make_jaxpr(each)(kept, cotangents, moved).jaxpr)
        # A gradient that is made on the way is one that the plain step need not make.
        return times * (found - (0 if taken is None else equation_flops(meeting.eqn)))

    left = factors[1] if meeting.keeps_row_gradients else factors
    route, late_route = (meeting.route(directions, late=late) for late in (False, True))
    whole = {
        "flops": extra(route, late=False),
        "late_flops": extra(late_route, late=True),
        "late_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(left)),
    }
    count = len(meeting.moving)
    return [
        Use(
            parameter=loss.names[path],
            operation="the loss" if meeting.eqn is None else describe_operation(meeting.eqn),
            times=times,
            row_axis="vmap" if loss.per_example else _row_axis(meeting),
            in_rows=in_rows,
            route=route,
            late_route=late_route,
            **{name: (total + number) // count for name, total in whole.items()},
        )
        for number, (path, in_rows) in enumerate(meeting.in_rows.items())
    ]


def _row_axis(meeting: Meeting) -> str:
    """ "1", or "1 = 6 x B" where rows are merged with others."""
    info = meeting.rows[meeting.differentiable[0]]
    if isinstance(meeting, Regrouped):
        return "moved"
    if not isinstance(info, Rows):
        return "-"
    sizes = [info.outer, "B", info.inner]
    merged = " x ".join(str(size) for size in sizes if size != 1)
    return str(info.axis) if merged == "B" else f"{info.axis} = {merged}"
