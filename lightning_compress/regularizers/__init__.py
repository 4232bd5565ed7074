"""Group-sparsity regularizers and their proximal maps, as functions of tensors.

A *penalty* is a differentiable scalar for the loss. A *proximal map* is what replaces its gradient when exact zeros are
wanted: it is applied to the weights after the optimizer step and is given here as one multiplicative factor in [0, 1]
per group, so that a group of any make-up (slices of several parameters) is shrunk by multiplying each of its members
with the factor of the group.

Orientation. ``torch.nn.Linear`` stores ``weight`` as ``(out_features, in_features)``: axis 0 is one group per output
unit, axis 1 is one group per input unit. Papers that write ``y = x W`` call these columns and rows of W; see
`tprune_strategy`.
"""

from lightning_compress.regularizers.blocks import (
    block_borders,
    block_group_lasso,
    block_group_lasso_prox_,
    block_line_norms,
)
from lightning_compress.regularizers.hoyer import hoyer_square, hoyer_square_factors
from lightning_compress.regularizers.lasso import (
    group_lasso,
    group_lasso_factors,
    trimmed_group_lasso,
    trimmed_group_lasso_factors,
)
from lightning_compress.regularizers.norms import group_norms
from lightning_compress.regularizers.table import REGULARIZERS, Regularizer, regularizer
from lightning_compress.regularizers.tprune import TPRUNE_STRATEGIES, RegularizedAxis, tprune_strategy

__all__ = [
    "REGULARIZERS",
    "TPRUNE_STRATEGIES",
    "RegularizedAxis",
    "Regularizer",
    "block_borders",
    "block_group_lasso",
    "block_group_lasso_prox_",
    "block_line_norms",
    "group_lasso",
    "group_lasso_factors",
    "group_norms",
    "hoyer_square",
    "hoyer_square_factors",
    "regularizer",
    "tprune_strategy",
    "trimmed_group_lasso",
    "trimmed_group_lasso_factors",
]
