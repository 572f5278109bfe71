"""The table of Flax modules: every rule, every use of a module, every transform, one row each."""

from models.modules import loops, norms, products, recurrent, uses
from models.modules.table import CASES

# One of each kind, where the whole table would say the same again.
KINDS = [
    "layernorm_rank_3",
    "groupnorm",
    "einsum_heads",
    "tied_head",
    "convolutions",
    "attention",
    "lstm",
    "optimized_lstm",
    "gru",
    "bidirectional",
    "recurrent_time_major",
    "shared_three_times",
    "scan_over_layers",
    "scan_with_shared_weights",
    "vmap_ensemble",
    "time_major_layers",
    "own_module_with_custom_vjp",
    "branches",
    "positions_in_a_module_of_their_own",
    "stopped_gradient",
]
