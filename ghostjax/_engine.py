"""The engine: one forward and one backward pass of a concatenated batch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ghostjax._aggregate import aggregate
from ghostjax._checks import batch_rows, check_parameters, check_val_batch_size
from ghostjax._dots import like_rows, wide_zeros
from ghostjax._errors import RowAxisError
from ghostjax._log import Log, aggregate_and_log
from ghostjax._loss import Arrays, Loss, check_reduction, trace_loss
from ghostjax._types import EngineResult
from ghostjax.core import Found, Rows, Split, mapped, summed, typed_as, zeros_of
from ghostjax.linen.layernorm import NORM_MEETINGS, capturing_norms


class GradDotProdEngine:
    """Per-row gradient inner products with a validation gradient, from one backward pass.

    With l_r the loss of row r, the training rows first and the V validation rows last,

        dots[p][i] = < d l_i / d p , d val_value / d p >,    val_value = (1/V) sum_v l_v

    for every parameter p and training row i.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs) -> losses [N]``, any JAX function.
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
    - which axis holds the rows is tracked through every operation, as by ``value_grad_and_dots``.
    - scale and bias of Flax's norms are captured: normalized activations and output cotangents go
      to ``linen.layernorm_dot_products``, where the parameters are used once and rows lie in front.

    Raises:
      RowAxisError: rows are mixed, or lost where a parameter is used; names the operation.
      ValueError, TypeError: the batch, the parameters or the losses do not fit.
      NotImplementedError: a parameter goes into an operation that cannot be walked, or the result
        is differentiated.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return x @ w
    >>> engine = GradDotProdEngine(loss_fn, val_batch_size=2)
    >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [4.0, 2.0]])
    >>> result = engine(jnp.array([1.0, 1.0]), batch)
    >>> result.value, result.val_value, result.dots
    (Array(1., dtype=float32), Array(4., dtype=float32), Array([3., 1.], dtype=float32))

    Source: Data Shapley in One Training Run, arXiv:2406.11011, section 4.2 (ghost dot-product).
    """

    def __init__(
        self, loss_fn: Callable[..., Any], *, val_batch_size: int, loss_reduction: str = "mean"
    ):
        check_reduction(loss_reduction)
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

    def aggregate_and_log(
        self, dots: Any, log: Log, *, step: int, ids: Sequence[Any], **columns: Any
    ) -> jax.Array:
        """Sums a tree of [B_train] dots, and adds them to a log; see ``aggregate_and_log``."""
        return aggregate_and_log(dots, log, step=step, ids=ids, **columns)

    def coverage(self, params: Any, batch: Any, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """For every parameter, the operations in which it meets data; empty for an unused one."""
        loss, arrays = self._trace(params, batch, args, kwargs)
        found, _ = _find(loss, arrays, self.val_batch_size)
        uses: dict[str, list[str]] = {name: [] for name in loss.names}
        for key, meeting in found.meetings.items():
            for path in meeting.moving:
                uses[loss.names[path]].append(found.operations[key])
        return uses

    def _trace(self, params, batch, args, kwargs) -> tuple[Loss, Arrays]:
        check_parameters(params)
        rows = batch_rows(batch)
        check_val_batch_size(self.val_batch_size, rows)
        with capturing_norms():
            return trace_loss(
                self.loss_fn,
                (params, batch, *args),
                kwargs,
                argnums=0,
                batch_argnums=1,
                has_aux=False,
                per_example=False,
                loss_reduction=self.loss_reduction,
                check_loss=lambda losses: _check_losses(losses, rows),
                named_meetings=NORM_MEETINGS,
            )

    def _compute(self, params, batch, traced, static) -> EngineResult:
        treedef, leaves = static
        remaining = iter(traced)
        args, kwargs = jax.tree.unflatten(
            treedef, [next(remaining) if leaf is None else leaf for leaf in leaves]
        )
        loss, arrays = self._trace(params, batch, args, kwargs)
        num_train = loss.num_rows - self.val_batch_size
        train_weight = 1 / num_train if self.loss_reduction == "mean" else 1.0
        # A power of two near 1/V: scaling by it rounds nothing, in bfloat16 either.
        val_weight = 2.0 ** -round(math.log2(self.val_batch_size))
        losses, grads, dots = _passes(loss, arrays, num_train, train_weight, val_weight)
        # In the dots, the loss of a training row has weight 1 and that of a validation row 1/V.
        scale = train_weight * val_weight * self.val_batch_size
        dots = [leaf / scale for leaf in dots]
        chex.assert_shape(dots, (num_train,))
        train, val = losses[:num_train], losses[num_train:]
        result = EngineResult(
            value=jnp.mean(train) if self.loss_reduction == "mean" else jnp.sum(train),
            val_value=jnp.mean(val),
            grads=jax.tree.unflatten(loss.params, grads),
            dots=jax.tree.unflatten(loss.params, dots),
        )
        return _undifferentiated(result, params)


@jax.custom_jvp
def _undifferentiated(result: EngineResult, params: Any) -> EngineResult:
    """``result``; an error where it is to be differentiated by ``params``."""
    del params
    return result


@_undifferentiated.defjvp
def _(primals, tangents):
    raise NotImplementedError(
        "what GradDotProdEngine returns cannot be differentiated: parameters are constants in its "
        "pass. Its grads are the gradient of its value; for derivatives of dots take "
        "value_grad_and_dots, which can be differentiated, or stop_gradient what goes in."
    )


def _passes(loss: Loss, arrays: Arrays, num_train: int, train_weight, val_weight):
    """Losses [N], gradients of the weighted training losses, and dots [B] with those of the
    validation losses.
    """
    found, specs = _find(loss, arrays, loss.num_rows - num_train)
    at_once = found.at_once()
    slots = {
        key: [zeros_of(leaf) for leaf in spec] for key, spec in specs.items() if key not in at_once
    }
    taps = [_zero_dots(leaf, num_train, arrays) for leaf in arrays.params]
    meetings = {}

    def run(params, taps, slots):
        walk = Split(loss, num_train, dict(enumerate(taps)), slots, at_once)
        losses = _losses(loss, arrays, walk, params)
        meetings.update(walk.found.meetings)
        return losses, walk.emitted

    losses, pull_back, kept = jax.vjp(run, arrays.params, taps, slots, has_aux=True)
    weights = jnp.full(loss.num_rows, val_weight, losses.dtype).at[:num_train].set(train_weight)
    weights = typed_as(weights, jax.typeof(losses))
    grads, dots, cotangents = pull_back(weights)
    if not slots:
        return losses, grads, dots
    factors = {key: (meetings[key], kept[key], cotangents[key]) for key in slots}
    more_grads, more_dots = _later(loss, arrays, factors)
    add = jnp.add
    return losses, [*map(add, grads, more_grads)], [*map(add, dots, more_dots)]


def _later(loss: Loss, arrays: Arrays, factors: dict[str, Any]):
    """Gradients and dots of parameters that are used more than once, or not as they are."""

    def pulled(which):
        """The gradient of the training or of the validation rows."""

        def of(meeting):
            part = getattr(meeting, which)
            return lambda *own: meeting.by_parameter(meeting.gradient(part, *own))

        gradients = {key: mapped(of(m), m, *own) for key, (m, *own) in factors.items()}
        return loss.pull(arrays, gradients)

    vectors = loss.push(arrays, pulled("val"), False)
    num_train = next(iter(factors.values()))[0].num_train
    dots = [_zero_dots(leaf, num_train, arrays) for leaf in arrays.params]
    for key, (meeting, *own) in factors.items():
        for path, found in summed(meeting.dots, meeting, *own, vectors[key]).items():
            chex.assert_shape(found, (num_train,))
            dots[path] = dots[path] + typed_as(found, jax.typeof(dots[path]))
    return pulled("train"), dots


def _zero_dots(param: Any, num_train: int, arrays: Arrays) -> jax.Array:
    """[B], sharded as the rows of the batch are."""
    rows = arrays.batch[0].shape[0]
    return like_rows(wide_zeros(param, (rows,)), arrays.batch)[:num_train]


def _find(loss: Loss, arrays: Arrays, val_rows: int) -> tuple[Found, dict[str, Any]]:
    """A walk in shapes: the meetings, and zeros like their cotangents."""
    found = Found()

    def run(params):
        walk = Split(loss, loss.num_rows - val_rows)
        _losses(loss, arrays, walk, params)
        found.update(walk.found)
        return walk.specs

    specs = jax.eval_shape(run, arrays.params)
    found.meetings = {key: found.meetings[key] for key in specs}
    return found, specs


def _losses(loss: Loss, arrays: Arrays, walk: Split, params) -> jax.Array:
    losses, _ = loss.open(walk, params, arrays.batch, arrays.others)
    if losses.rows != Rows(0):
        reason = getattr(losses.rows, "reason", "they depend on no row")
        raise RowAxisError(
            "loss_fn must return losses [N], that of row i at place i. Found losses that are mixed "
            f"or in another order: {reason}. Compute every row's loss from that row alone, and "
            "return the losses in the order of the batch."
        )
    return losses.primal


def _check_losses(losses: Any, rows: int) -> None:
    shape = getattr(losses, "shape", None)
    if shape != (rows,):
        found = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", losses)
        raise ValueError(
            f"loss_fn must return one loss per row, an array of shape ({rows},). Found {found}."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return floating-point losses. Found {losses.dtype}{list(shape)}."
        )


def _is_traced(leaf: Any) -> bool:
    """Arrays and numbers; switches, names and functions are part of the program."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or (
        isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
    )
