"""Flax linen: LayerNorm and its kin, captured by method interceptors."""

from ghostjax.linen.layernorm import layernorm_dot_products as layernorm_dot_products
