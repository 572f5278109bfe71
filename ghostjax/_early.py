"""value_grad_and_dots: the direction form, for any JAX function."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ghostjax._checks import check_direction
from ghostjax._dots import GradDots, directed
from ghostjax._face import on_loss
from ghostjax._loss import Arrays, Loss
from ghostjax._row_gradients import directed_with_norms
from ghostjax.core import Labels


def value_grad_and_dots(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    per_example: bool = False,
    loss_reduction: str = "mean",
    coupled: str = "error",
    norms: bool = False,
) -> Callable[..., GradDots]:
    """``jax.value_and_grad``, and the inner product of every row's gradient with a direction.

        dots[p][i] = < d l_i / d p , direction[p] >            or, of K directions at once,
        dots[p][k, i] = < d l_i / d p , direction[p][k] >

    for any JAX function, out of the backward pass that gives the gradient. Where the direction
    depends on that gradient, see ``value_and_dots_fn``.

    Args:
      loss_fn: ``loss_fn(params, batch, ...) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
      argnums: which positional arguments are the parameters: trees of floating-point arrays. Or an
        Equinox or NNX module, of which the parameters are, and the gradient is, what they are for
        ``eqx.filter_grad`` and ``nnx.grad``; state that the loss changes is an error there.
      batch_argnums: which are the batch: trees of arrays that share their leading size B.
      has_aux: whether ``loss_fn`` gives aux, a tree of arrays, beside the loss.
      per_example: whether ``loss_fn`` is the loss of one row: the batch arguments come without
        their leading axis, and ``value`` is the mean (or sum) over rows, aux stacked over rows.
      loss_reduction: "mean": the loss is a mean over rows and dots[i] refers to row i's own loss,
        B times its share; "sum": dots[i] is row i's share of <grads, direction>. A row's share is
        the derivative of the loss as that row alone sees the parameters move along the direction,
        which is defined for losses that are no sum over rows, too (their maximum, say).
      coupled: what to do where rows see each other in the loss, as in contrastive losses and in
        BatchNorm in training. "error": refuse. "share": dots[i] is row i's share, the derivative of
        the loss as the parameters move along the direction in row i's uses of them alone,

            dots[p][i] = sum over the uses u of p in row i of < d loss / d p_u , direction[p] >

        (times B for "mean"). A use belongs to the row that has the place of its result; where no
        row axis is left, as in a product of all pairs of rows, to nobody: it goes to ``shared``, so
        that shares and ``shared`` add up to <grads, direction>.
      norms: whether the result has ``squared_norms`` of the rows' gradients, and so ``cosine``, at
        the price of ``ghostjax.squared_norms`` without its pass.

    Returns:
      ``fn(*args, direction, labels=None, num_labels=None, **kwargs) -> GradDots``, with
      ``direction`` a tree like the parameters (a tuple of trees for several argnums), same shapes
      and dtypes; or with a leading axis K on every leaf, of K directions, and then dots are [K, B]
      and only the products with the directions are computed K times. With ``labels``, integers [B]
      or [B, T], dots are those of ``num_labels`` = S examples, [S]: label s has all that belongs
      to places with that number; negative ones are padding, of nobody. Labels [B, T] are for batch
      arrays [B, T, ...]: a parameter's use counts for the position where it is used, so that
      documents in one row have the dots of documents apart, if they do not see each other. It is
      a pure function for use under ``jax.jit``.

    Guarantees: value, aux and grads are computed by the operations of ``jax.value_and_grad``; but a
    matrix product over many positions or with many directions makes its weight gradient row by row,
    if that costs less, and the sum over rows equals that of ``jax.grad`` to rounding. Where
    parameters are used is found in the jaxpr, whatever library made it; which axis holds rows is
    tracked through every operation. What cannot be followed is an error, never a skip.

    Raises:
      RowAxisError: rows are mixed, or lost where a parameter is used, without ``coupled="share"``;
        names the operation.
      ValueError, TypeError: the batch or the direction does not fit.
      NotImplementedError: a parameter goes into an operation that cannot be walked.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.square(x @ w) / 2)
    >>> fn = value_grad_and_dots(loss_fn)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> result = fn(w, x, direction=jnp.array([1.0, 0.5]))
    >>> result.value, result.grads, result.dots
    (Array(2.5, dtype=float32), Array([2., 3.], dtype=float32), Array([1., 6.], dtype=float32))
    >>> fn(w, x, direction=jnp.eye(2)).dots
    Array([[1., 3.],
           [0., 6.]], dtype=float32)

    Source: Data Shapley in One Training Run, arXiv:2406.11011, for what the dots are good for.
    """
    if norms and coupled == "share":
        raise ValueError(
            "coupled rows have shares of the loss, and no norms of gradients of their own. Call "
            'with norms=False, or with coupled="error".'
        )

    def run(loss: Loss, arrays: Arrays, labels: Labels | None, *, direction: Any) -> GradDots:
        params = jax.tree.unflatten(loss.params, arrays.params)
        directions = check_direction(params, direction, stacked=True)
        make = directed_with_norms if norms else directed
        return make(loss, arrays, direction, directions, labels)

    return on_loss(
        loss_fn,
        run,
        keywords=["direction"],
        argnums=argnums,
        batch_argnums=batch_argnums,
        has_aux=has_aux,
        per_example=per_example,
        loss_reduction=loss_reduction,
        coupled=coupled,
    )
