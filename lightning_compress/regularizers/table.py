"""Regularizers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_compress.regularizers._checks import unknown_name
from lightning_compress.regularizers.blocks import block_group_lasso, block_group_lasso_prox_
from lightning_compress.regularizers.hoyer import hoyer_square, hoyer_square_factors
from lightning_compress.regularizers.lasso import group_lasso, group_lasso_factors


@dataclass(frozen=True)
class Regularizer:
    """A penalty for the loss and the map that takes its place after the optimizer step.

    Attributes:
        name: key in `REGULARIZERS`.
        acts_on: ``"norms"``: ``penalty(norms, weights=None)`` and ``factors(norms, step, weights=None) -> factors`` of
            a vector of group norms. ``"matrix"``: ``penalty(weight, block_shape=None, block_grid=None)`` and
            ``factors(weight, step, block_shape=None, block_grid=None)`` of a matrix; overlapping groups have no single
            factor each, so the latter shrinks in place.
        penalty: differentiable scalar.
        factors: the shrinking step.
    """

    name: str
    acts_on: Literal["norms", "matrix"]
    penalty: Callable[..., Tensor]
    factors: Callable[..., Tensor]


REGULARIZERS: Mapping[str, Regularizer] = {
    entry.name: entry
    for entry in (
        Regularizer("group_lasso", "norms", group_lasso, group_lasso_factors),
        Regularizer("hoyer_square", "norms", hoyer_square, hoyer_square_factors),
        Regularizer("block_group_lasso", "matrix", block_group_lasso, block_group_lasso_prox_),
    )
}


def regularizer(name: str) -> Regularizer:
    """The regularizer of this name.

    Raises:
        ValueError: if there is none; the message lists the names.

    >>> regularizer("group_lasso").acts_on
    'norms'
    """
    if name not in REGULARIZERS:
        raise unknown_name("regularizer", name, REGULARIZERS)
    return REGULARIZERS[name]
