"""select_step: a training step on the best of many candidate rows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ghostjax._checks import batch_rows
from ghostjax.selection.candidates import Candidates, Policy, by_score, row_losses
from ghostjax.selection.meshes import taken, whole
from ghostjax.selection.weights import check_k, of_size_one, rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """What a step of ``select_step`` was made of.

    Attributes:
      value: scalar, the weighted mean loss of the rows trained on, before the step; NaN if none is.
      rows: [k] int32, their numbers in the batch, ascending; -1 at the end where the policy kept
        fewer. If it kept none, as where the validation gradient is not finite, all are -1, and
        parameters and state are what they were.
      weights: [N] float32, what the policy gave.
    """

    value: jax.Array
    rows: jax.Array
    weights: jax.Array


def select_step(
    loss_fn: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    k: int,
    policy: Policy = by_score,
    *,
    exclude: Sequence[str] = (),
    through_optimizer: bool = True,
    remat: bool = False,
) -> Callable[..., tuple[Any, Any, Selected]]:
    """A jitted training step that looks at N candidate rows and trains on k of them.

        weights = policy(candidates, k)                                      [N], at most k count
        loss = sum over the rows kept of weights[i] * loss_fn(params, batch)[i] / sum of weights

    and the optimizer's update with that loss's gradient.

    Args:
      loss_fn: ``loss_fn(params, batch) -> losses [N]``, of any number of rows; a row's loss depends
        on that row alone.
      optimizer: any optax transformation. Updates that have the loss in them (plateaus, line
        searches) get ``value``, ``grad`` and ``value_fn``.
      k: static, 1 <= k <= N.
      policy: ``policy(candidates, k) -> weights [N]``, float >= 0. ``selection`` has ``by_score``,
        ``by_loss``, ``by_norm`` and ``at_random``; others are one line, of ``Candidates`` and the
        functions of ``selection``:

            lambda rows, k: selection.sample(rows.scores, k, rows.key, temperature=0.5)
            lambda rows, k: selection.greedy(rows.scores, rows.gram, k, interaction=lr / k**2)

        (the latter with ``through_optimizer=False``). Where more than k rows have a weight, the k
        largest count. A row whose weight is NaN or infinite is never trained on, nor by the
        policies above, but ``at_random``, one whose score is not finite.
      exclude: parameters left out of scores, norms and Gram matrix, by patterns of ``fnmatch`` for
        paths like "layers_0/kernel". Scores are then those of a step in which these parameters
        have a gradient of zero and stay. All are trained.
      through_optimizer: whether scores go through the optimizer; if not, they are plain inner
        products with the validation gradient, for optimizers without a derivative (lion), those
        that gather gradients (through optax.MultiSteps scores are 0 where it does not update, and
        the first k rows are taken), and Adam's first step, whose derivative is rounding.
      remat: for scores through the optimizer, keep no factors but make the passes again.

    Returns:
      ``step(params, opt_state, batch, val_batch, *, key=None) -> (params, opt_state, Selected)``,
      under ``jax.jit``. ``batch`` has the N candidates, ``val_batch`` any number of validation
      rows; both are trees of arrays with rows in front. ``key`` is for policies that draw.

    Guarantees: the new parameters are those of an ordinary step on the rows kept alone. What the
    policy does not ask for is not computed.

    Cost in plain steps on k rows (XLA's FLOPs, GPT-2 shape of ``benchmarks``, N = 16, V = 8,
    k = 8): ``at_random`` 1.00, ``by_loss`` 1.67, ``by_norm`` 2.82; ``by_score``
    4.62 where all gradients are finite (XLA also counts the pass without those that are not, 7.24),
    and without the optimizer, whose gradient at all candidates is then not needed, 4.00.
    Leaving out the tied embedding of 2048 tokens makes that 3.87, leaving out all but the last
    block 2.57. Scores take 3.4 times the scratch memory of the plain step, through the optimizer
    4.1.

    Raises:
      TypeError: k is no int, or ``exclude`` a single string.
      ValueError: k, a pattern (the paths are listed), the losses or the weights do not fit; the
        optimizer has no derivative; or a policy draws without a key.
      What ``value_and_dots_fn`` raises, as where rows are mixed.

    >>> import jax.numpy as jnp, optax
    >>> def loss_fn(w, batch):
    ...     return jnp.square(batch["x"] @ w - batch["y"])
    >>> optimizer = optax.sgd(0.1)
    >>> step = select_step(loss_fn, optimizer, k=1)
    >>> w, x = jnp.zeros(2), jnp.eye(2)
    >>> batch = {"x": x, "y": jnp.array([1.0, -1.0])}
    >>> val_batch = {"x": x, "y": jnp.array([1.0, 1.0])}
    >>> w, _, selected = step(w, optimizer.init(w), batch, val_batch)
    >>> w, selected.rows
    (Array([0.2, 0. ], dtype=float32), Array([0], dtype=int32))
    """
    optimizer = optax.with_extra_args_support(optimizer)
    # The step is traced anew for other shapes, and an iterator would be at its end by then.
    exclude = exclude if isinstance(exclude, str) else tuple(exclude)

    @jax.jit
    def step(
        params: Any, opt_state: Any, batch: Any, val_batch: Any, *, key: Any = None
    ) -> tuple[Any, Any, Selected]:
        count = batch_rows(batch)
        check_k(k, count)
        candidates = Candidates(
            loss_fn,
            optimizer,
            k,
            exclude=exclude,
            through_optimizer=through_optimizer,
            remat=remat,
            args=(params, opt_state, batch, val_batch),
            key=key,
        )
        weights = policy(candidates, k)
        _check_weights(weights, count)
        weights = whole(jnp.asarray(weights))
        kept = jnp.where(jnp.isfinite(weights), weights, 0).astype(jnp.float32)
        chosen = rows(kept, k)
        is_row = chosen >= 0
        # Places without a row have the first one once more, whose loss is as finite as it is.
        places = jnp.where(is_row, chosen, jnp.maximum(chosen[0], 0))
        # Of size one, as sums of large weights overflow and small ones are 0 to processors.
        own = of_size_one(jnp.where(is_row, kept[places], 0))
        batch = jax.tree.map(lambda leaf: taken(jnp.asarray(leaf), places), batch)

        def train_loss(params):
            losses = row_losses(loss_fn, params, batch)
            wide = own.astype(jnp.promote_types(own.dtype, losses.dtype))
            share = wide / jnp.where(is_row[0], jnp.sum(wide), 1)
            return jnp.sum(share.astype(losses.dtype) * losses)

        value, grads = jax.value_and_grad(train_loss)(params)
        updates, new_state = optimizer.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=train_loss
        )
        new = optax.apply_updates(params, updates), new_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_row[0], new, old), new, (params, opt_state)
        )
        value = jnp.where(is_row[0], value, jnp.nan)
        return params, opt_state, Selected(value, chosen, weights)

    return step


def _check_weights(weights: Any, count: int) -> None:
    dtype = jnp.result_type(weights)
    if jnp.shape(weights) != (count,) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"policy must return weights, floating point [{count}], one for each candidate. Found "
            f"{dtype}{list(jnp.shape(weights))}."
        )
