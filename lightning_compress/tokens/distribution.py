"""How many tokens went through each layer, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.tokens.costs import LayerCosts, relative_macs


@dataclass(frozen=True, eq=False)
class TokenDistribution:
    """What was kept of some examples, as plain numbers.

    Args:
        entering: (layers, examples), tokens that entered each layer.
        real: (examples,), tokens of each example before the first layer, without padding.
        costs: what they cost.
    """

    entering: Tensor
    real: Tensor
    costs: LayerCosts

    @classmethod
    def together(cls, parts: Sequence[TokenDistribution]) -> TokenDistribution:
        """The examples of all parts, at least one, of one model."""
        return cls(torch.cat([p.entering for p in parts], 1), torch.cat([p.real for p in parts]), parts[0].costs)

    @property
    def relative_macs(self) -> float:
        """Multiply-accumulates of the layers, as a fraction of those with all real tokens."""
        return relative_macs(self.costs, self.entering, self.real)

    @property
    def kept_per_layer(self) -> tuple[float, ...]:
        """Fraction of the real tokens of all examples that enters each layer; 1 where there are none."""
        return _fractions(self.entering.sum(1), self.real.sum().expand(len(self.entering)))

    @property
    def kept_per_example(self) -> tuple[float, ...]:
        """For each example the multiply-accumulates, as a fraction of those with all of its real tokens; 1 for none."""
        return _fractions(self.costs.macs(self.entering).sum(0), self.costs.macs(self.real).sum(0))

    def state(self) -> dict[str, Any]:
        """Tensors, for a checkpoint."""
        return {"entering": self.entering, "real": self.real}


def _fractions(part: Tensor, whole: Tensor) -> tuple[float, ...]:
    nothing = whole <= 0  # as in ``LayerCosts.relative``
    return tuple(torch.where(nothing, 1.0, part / whole.masked_fill(nothing, 1.0)).tolist())


__all__ = ["TokenDistribution"]
