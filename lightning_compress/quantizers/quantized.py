"""A weight as integers: what is stored once, and what every kernel computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.quantizers.blocks import Scope


@dataclass(frozen=True, eq=False)
class Grid:
    r"""The values that a block may have, :math:`k\,c + o` for the integers :math:`k` from low to high.

    Args:
        low: the smallest integer.
        high: the largest integer.
        scale: :math:`c`, (blocks, 1), at least 0.
        offset: :math:`o`, (blocks, 1); None for zero.
    """

    low: int
    high: int
    scale: Tensor
    offset: Tensor | None = None

    def positions(self, blocks: Tensor) -> Tensor:
        """Where values (blocks, elements) lie, in units of the scale from the integer 0; 0 where the scale is 0."""
        moved = blocks if self.offset is None else blocks - self.offset
        return moved / torch.where(self.scale > 0, self.scale, torch.inf)  # 0 without another pass over the blocks

    def nearest(self, blocks: Tensor) -> Tensor:
        """The integers whose values are nearest, (blocks, elements)."""
        return self.positions(blocks).round_().clamp_(self.low, self.high)

    def values(self, integers: Tensor) -> Tensor:
        """The values of integers (blocks, elements)."""
        values = integers.to(self.scale.dtype) * self.scale
        return values if self.offset is None else values + self.offset

    def cut(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions cut off at the ends, and bool: which lay between them."""
        cut = positions.clamp(self.low, self.high)
        return cut, cut == positions


@dataclass(frozen=True, eq=False)
class Quantized:
    """Integers, and what they stand for.

    Args:
        integers: of the shape of the weight, int8, or int16 where that does not hold them.
        grid: of every block.
        scope: how the weight is divided into blocks.
        bits: so many bits an integer takes when it is packed.
        dtype: of the weight.
    """

    integers: Tensor
    grid: Grid
    scope: Scope
    bits: int
    dtype: torch.dtype

    def dequantized(self) -> Tensor:
        """The weight that they stand for, in its own type."""
        values = self.grid.values(self.scope.split(self.integers))
        return values.reshape(self.integers.shape).to(self.dtype)

    @property
    def bytes(self) -> int:
        """Bytes when packed: every block's integers, its scale and its offset."""
        parts = (self.grid.scale, self.grid.offset)
        return packed_bytes(self.integers.numel(), self.bits) + sum(
            p.numel() * p.element_size() for p in parts if p is not None
        )


def packed_bytes(elements: int, bits: int) -> int:
    """Bytes of so many packed integers; integers of 3, 5, 6 and 7 bits take those of 4 and 8, of 9 bits those of 16."""
    return -(-elements * slot_bits(bits) // 8)


def slot_bits(bits: int) -> int:
    """Bits that a packed integer takes: the next of 1, 2, 4, 8 and 16."""
    return next(size for size in (1, 2, 4, 8, 16) if size >= bits)


__all__ = ["Grid", "Quantized", "packed_bytes", "slot_bits"]
