"""Result types, and the legend of the axis letters.

One letter per axis in every docstring and einsum string of the package:

    B  training rows                       T  positions of a row
    V  validation rows                     F  features;  i, o  features in and out of a layer
    N  = B + V concatenated rows,          K  directions
       training rows first
"""

import dataclasses
from typing import Any

import jax

from ghostjax._aggregate import aggregate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineResult:
    """What ``GradDotProdEngine`` returns for one concatenated batch.

    Attributes:
      value: scalar, the reduced loss of the B training rows.
      val_value: scalar, the mean loss of the V validation rows.
      grads: gradient of ``value``, a tree like the parameters.
      dots: a tree like the parameters, every leaf [B] in float32 (float64 for a float64
        parameter): ``dots[p][i] = <d loss_i / d p, d val_value / d p>``.
    """

    value: jax.Array
    val_value: jax.Array
    grads: Any
    dots: Any

    def total(self) -> jax.Array:
        """The dots summed over all parameters, [B]."""
        return aggregate(self.dots)
