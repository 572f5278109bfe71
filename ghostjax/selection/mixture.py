"""Mixture weights of domains from their values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mixture(
    values: jax.Array, prior: Any = None, *, rate: Any = 1.0, smoothing: float = 1e-3
) -> jax.Array:
    """The share that each domain should have in the data: an exponentiated-gradient step.

        weights[d] = (1 - c) * prior[d] * exp(rate * values[d]) / normalizer + c / D

    The step goes from ``prior`` to the mixture with the largest expected value that is not far from
    it, in relative entropy. One step after another, of values [D] each, it is DoGE's update; and
    as exponents add up, a single step with the sum of the values makes up for all of them, but for
    the smoothing.

    Args:
      values: [D], what a row of the domain is worth: positive helps. For DoGE's update, the
        decrease of the validation loss by a training step on this domain alone: the dots through
        the optimizer, ``labels`` the rows' domains and ``num_labels=D``, over the number of rows
        of each domain. NaN where there is none, such as 0 / 0 of a domain without rows: its share
        stays what it was, but for the smoothing.
      prior: [D], the shares so far, positive, of any sum; by default equal.
      rate: positive scalar, one over the unit of the values; may be traced. Large: the domain with
        the largest value alone.
      smoothing: c, static, from 0 to 1. Above 0, no domain is lost for good.

    Returns:
      [D] float32, positive for c > 0, with sum 1.

    Raises:
      ValueError: a shape, the smoothing or, where it is known, the rate or the prior does not fit.

    >>> import jax.numpy as jnp
    >>> mixture(jnp.array([1.0, 2.0, 0.0])).round(3)
    Array([0.245, 0.665, 0.09 ], dtype=float32)

    Source: DoGE, Fan et al., arXiv:2310.15393, algorithm 1 (``rate`` is one over its mu); the
    smoothing is that of DoReMi, Xie et al., arXiv:2305.10429. Kivinen and Warmuth 1997,
    doi:10.1006/inco.1996.2612, for the step.
    """
    values = jnp.asarray(values)
    if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"values must be floating point [D], got {values.dtype}{values.shape}.")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be from 0 to 1, got {smoothing}.")
    values = jax.lax.stop_gradient(values.astype(jnp.float32))
    prior = np.ones(values.shape, np.float32) if prior is None else prior
    if jnp.shape(prior) != values.shape:
        raise ValueError(
            f"prior must be [D] like the values, one share for each of {values.size} domains, got "
            f"{list(jnp.shape(prior))}."
        )
    _check_positive("rate", rate)
    _check_positive("prior", prior)
    prior = jnp.asarray(prior, jnp.float32)
    prior = prior / jnp.sum(prior)
    is_known = ~jnp.isnan(values)
    exponents = jnp.log(prior) + jnp.asarray(rate, jnp.float32) * values
    shares = jax.nn.softmax(exponents, where=is_known)
    weights = jnp.where(is_known, shares * jnp.sum(prior, where=is_known), prior)
    return (1 - smoothing) * weights + smoothing / values.size


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive, got {value}.")
