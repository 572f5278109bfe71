"""The factor form, for Flax linen modules."""

from ghostjax.linen._engine import GradDotProdEngine as GradDotProdEngine
from ghostjax.linen._norms import layernorm_dot_products as layernorm_dot_products
