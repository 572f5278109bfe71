"""The engine: one forward and one backward pass of a concatenated batch."""

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from ghostjax._aggregate import aggregate
from ghostjax._checks import batch_rows, check_parameters, check_val_batch_size
from ghostjax._types import EngineResult
from ghostjax.linen._boxes import is_leaf
from ghostjax.linen._capture import Capture
from ghostjax.linen._frames import box_parameters, is_array
from ghostjax.linen._plan import make_plan
from ghostjax.linen._tasks import make_tasks


class GradDotProdEngine:
    """Per-row gradient inner products with a validation gradient, from one backward pass.

    With l_r the loss of row r, the training rows first and the V validation rows last,

        dots[p][i] = < d l_i / d p , d val_value / d p >,    val_value = (1/V) sum_v l_v

    for every parameter p and training row i. Row i's loss must depend on row i alone, and row
    i must stay at place i of every row axis on its way through the layers.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs) -> losses [N]``, calling linen modules.
      val_batch_size: V, the number of validation rows at the end of every batch.
      loss_reduction: "mean": ``value`` is the mean of the training rows' losses; "sum": their sum.
        ``grads`` is its gradient. The dots do not depend on it.

    Calling the engine, ``engine(params, batch, *args, **kwargs)``, returns an ``EngineResult``. It
    is a pure function, compiled on first use for each shape, and works under ``jax.jit``:

    - ``batch``: tree of arrays with leading size N = B + V; ``args`` and ``kwargs`` are passed on
      as they are (random keys, constants; switches and names are static).
    - ``grads`` is what ``jax.grad`` of the training loss gives: training does not change. Dropout
      is drawn for N rows at once, so the training rows get other masks than in a batch of B rows,
      and the validation rows get masks too.
    - dots are float32 whatever the model's dtype (float64 for float64 parameters).

    Raises:
      ValueError, TypeError: while tracing, with the place and what to do, when something cannot be
        taken apart exactly: a parameter used outside its module or where rows have no axis of their
        own, BatchNorm in training mode, rows that do not fit. No parameter is left out in silence.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(1, use_bias=False)
    >>> def loss_fn(params, batch):
    ...     return jnp.squeeze(model.apply({"params": params}, batch), -1)
    >>> engine = GradDotProdEngine(loss_fn, val_batch_size=2)
    >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [4.0, 2.0]])
    >>> result = engine({"kernel": jnp.array([[1.0], [1.0]])}, batch)
    >>> result.value, result.val_value, result.dots["kernel"]
    (Array(1., dtype=float32), Array(4., dtype=float32), Array([3., 1.], dtype=float32))

    Source: Data Shapley in One Training Run, arXiv:2406.11011, section 4.2 (ghost dot-product).
    """

    def __init__(
        self, loss_fn: Callable[..., Any], *, val_batch_size: int, loss_reduction: str = "mean"
    ):
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}.')
        self.loss_fn = loss_fn
        self.val_batch_size = check_val_batch_size(val_batch_size)
        self.loss_reduction = loss_reduction
        self._jitted = jax.jit(self._compute, static_argnums=3)

    def __call__(self, params: Any, batch: Any, *args: Any, **kwargs: Any) -> EngineResult:
        check_parameters(params)
        check_val_batch_size(self.val_batch_size, batch_rows(batch))
        leaves, treedef = jax.tree.flatten((args, kwargs))
        static = tuple(None if _is_traced(leaf) else leaf for leaf in leaves)
        traced = [leaf for leaf in leaves if _is_traced(leaf)]
        return self._jitted(params, batch, traced, (treedef, static))

    def aggregate(self, dots: Any) -> jax.Array:
        """Sums a tree of [B] dots over its parameters, every leaf checked; see ``aggregate``."""
        return aggregate(dots)

    def coverage(self, params: Any, batch: Any, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """For every parameter, the module calls that use it; empty for an unused one."""
        check_parameters(params)
        plan = make_plan(self.loss_fn, params, batch, args, kwargs)
        return {
            path: [plan.units[index].frame.name for index in sites]
            for path, sites in plan.sites.items()
        }

    def _compute(self, params, batch, traced, static) -> EngineResult:
        treedef, leaves = static
        remaining = iter(traced)
        args, kwargs = jax.tree.unflatten(
            treedef, [next(remaining) if leaf is None else leaf for leaf in leaves]
        )
        rows = batch_rows(batch)
        num_train = rows - self.val_batch_size
        paths_and_values, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
        leaves = {jax.tree_util.keystr(path): value for path, value in paths_and_values}
        values = meta.unbox(leaves)
        plan = make_plan(self.loss_fn, params, batch, args, kwargs)
        tasks = make_tasks(plan, values, rows, num_train)
        token = object()

        def run(carried):
            capture = Capture(plan, tasks, rows, num_train)
            boxed = box_parameters(params, carried, token)
            with nn.intercept_methods(capture):
                losses = self.loss_fn(boxed, batch, *args, **kwargs)
            capture.check_complete()
            return losses

        carried = {
            path: {"gradient": values[path], "taps": task.taps()} for path, task in tasks.items()
        }
        losses, pull_back = jax.vjp(run, carried)
        train_weight = 1 / num_train if self.loss_reduction == "mean" else 1.0
        # A power of two near 1/V: scaling by it rounds nothing, in bfloat16 either.
        val_weight = 2.0 ** -round(math.log2(self.val_batch_size))
        weights = jnp.full(rows, val_weight, losses.dtype).at[:num_train].set(train_weight)
        (carried,) = pull_back(weights)

        # In the dots, the loss of a training row has weight 1 and that of a validation row 1/V.
        scale = train_weight * val_weight * self.val_batch_size
        dots = {path: task.dots(carried[path]["taps"]) / scale for path, task in tasks.items()}
        chex.assert_shape(list(dots.values()), (num_train,))
        grads = {path: carried[path]["gradient"] for path in tasks}

        def like_params(arrays):
            boxed = [meta.replace_boxed(value, arrays[path]) for path, value in leaves.items()]
            return jax.tree.unflatten(treedef, boxed)

        train, val = losses[:num_train], losses[num_train:]
        return EngineResult(
            value=jnp.mean(train) if self.loss_reduction == "mean" else jnp.sum(train),
            val_value=jnp.mean(val),
            grads=like_params(grads),
            dots=like_params(dots),
        )


def _is_traced(leaf: Any) -> bool:
    """Arrays and numbers; switches, names and functions are part of the program."""
    return is_array(leaf) or (
        isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
    )
