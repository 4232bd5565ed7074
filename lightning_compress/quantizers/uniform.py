"""Uniform quantization: the range of a block in equal steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.quantizers.base import Quantizer, Rounded
from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.quantized import Grid


@dataclass(frozen=True)
class Uniform(Quantizer):
    r"""Equal steps over the range of a block.

    .. math:: \hat w = c \operatorname{round}(w / c), \quad c = \frac{\max |w|}{2^{b-1} - 1}

    or, not symmetric, with a zero point :math:`z` so that 0 stays 0,

    .. math:: \hat w = c\,(\operatorname{clip}(\operatorname{round}(w / c) + z, 0, 2^b - 1) - z), \quad
        c = \frac{\max(w, 0) - \min(w, 0)}{2^b - 1}, \quad z = \operatorname{round}(-\min(w, 0) / c)

    Args:
        bits: :math:`b`, from 2 to 8, or 16.
        scope: which elements share a scale: "tensor", "row" or "group:K".
        symmetric: whether the range is that of both signs.

    Raises:
        ValueError: for other bits or scopes.

    References: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference".
    """

    bits: int = 8
    scope: str = "row"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(f"Expected bits of Uniform to be an integer from 2 to 8, or 16, but got {self.bits!r}.")
        Scope(self.scope)

    @property
    def stored_bits(self) -> int:
        """Those of the argument."""
        return self.bits

    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """The nearest steps; nothing is cut off."""
        grid = self._symmetric(blocks) if self.symmetric else self._affine(blocks)
        return Rounded(grid, grid.nearest(blocks))

    def _symmetric(self, blocks: Tensor) -> Grid:
        high = 2 ** (self.bits - 1) - 1
        return Grid(-high, high, blocks.abs().amax(1, keepdim=True) / high)

    def _affine(self, blocks: Tensor) -> Grid:
        # stored as signed integers, so that eight bits are an int8, and sixteen an int16
        steps, low = 2**self.bits - 1, -(2 ** (self.bits - 1))
        least, most = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
        scale = (most - least) / steps
        zero = (-least / scale.where(scale > 0, 1)).round() + low
        return Grid(low, low + steps, scale, -zero * scale)


__all__ = ["Uniform"]
