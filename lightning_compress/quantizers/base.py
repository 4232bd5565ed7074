"""What all quantizers do: a grid for every block, integers on it, and gradients that pass straight through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.quantized import Grid, Quantized


@dataclass(frozen=True, eq=False)
class Rounded:
    """Blocks on their grids.

    Args:
        grid: of every block.
        integers: (blocks, elements), whole numbers in floating point.
        passes: bool (blocks, elements), which elements get gradients; None for all.
    """

    grid: Grid
    integers: Tensor
    passes: Tensor | None = None


class Quantizer(ABC):
    """Takes a weight to few values in the forward pass, and gradients back as if it had not.

    In training ``quantizer(weight, generator=...)`` may round at random; without a generator, as in evaluation, every
    quantizer is deterministic. ``quantize`` gives the integers; they stand for exactly the values that a call without a
    generator returns.
    """

    scope: str

    @property
    @abstractmethod
    def stored_bits(self) -> int:
        """Bits that a stored integer has."""

    @abstractmethod
    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """Blocks (blocks, elements), at least float32, on their grids.

        Args:
            blocks: the weight, divided by ``scope``.
            generator: for rounding at random; None for none.
            step: what is learned beside the weight, (blocks, 1); None where nothing is.
        """

    def first_step(self, weight: Tensor) -> Tensor | None:
        """First value of what is learned beside the weight, (blocks, 1); None for nothing."""
        return None

    def __call__(self, weight: Tensor, generator: torch.Generator | None = None, step: Tensor | None = None) -> Tensor:
        """The weight with the values of the grid.

        Args:
            weight: (rows, ...), floating point.
            generator: for quantizers that round at random in training; None rounds to the nearest.
            step: what is learned, for quantizers with a ``first_step``.

        Returns:
            Like the weight; the gradient of the output is that of the weight, but for elements that are cut off.
        """
        with torch.no_grad():
            rounded = self.rounded(self.blocks(weight), generator, step)
            values = rounded.grid.values(rounded.integers).reshape(weight.shape).to(weight.dtype)
            passes = None if rounded.passes is None else rounded.passes.reshape(weight.shape)
        return straight_through(weight, values, passes)

    @torch.no_grad()
    def quantize(self, weight: Tensor, step: Tensor | None = None) -> Quantized:
        """The integers of a weight, as evaluation computes with them.

        Raises:
            ValueError: for a weight that is not floating point or has elements that are not finite.
        """
        check_weight(weight)
        rounded = self.rounded(self.blocks(weight), None, step)
        fits = rounded.grid.low >= -128 and rounded.grid.high <= 127
        integers = rounded.integers.to(torch.int8 if fits else torch.int16).reshape(weight.shape).contiguous()
        return Quantized(integers, rounded.grid, Scope(self.scope), self.stored_bits, weight.dtype)

    def blocks(self, weight: Tensor) -> Tensor:
        """(blocks, elements), at least float32: scales in half precision would be as coarse as what they scale."""
        wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        return Scope(self.scope).split(wide).contiguous()  # sums in one order, whatever the layout


def straight_through(exact: Tensor, values: Tensor, passes: Tensor | None = None) -> Tensor:
    """``values``, bit for bit, with the gradient of ``exact``.

    Args:
        exact: what was rounded.
        values: like it, rounded; no gradient goes there.
        passes: bool, which elements get gradients; None for all.
    """
    result: Tensor = _StraightThrough.apply(exact, values, passes)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, values: Tensor, passes: Tensor | None) -> Tensor:
        ctx.save_for_backward(passes)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient if passes is None else gradient * passes, None, None


def check_weight(weight: Tensor) -> None:
    """Raise ValueError for what cannot be quantized."""
    if not weight.is_floating_point():
        raise ValueError(
            f"Expected a weight of floating point numbers, but got {weight.dtype}. It may be quantized already."
        )
    bad = int((~weight.detach().isfinite()).sum())
    if bad:
        raise ValueError(
            f"Expected finite weights, but {bad} of the {weight.numel()} elements of a weight of shape "
            f"{tuple(weight.shape)} are NaN or infinite. Look for a step that diverged."
        )


def check_bits(name: str, bits: int, low: int, high: int) -> None:
    """Raise ValueError unless ``bits`` is an integer from low to high."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
        raise ValueError(f"Expected bits of {name} to be an integer from {low} to {high}, but got {bits!r}.")


__all__ = ["Quantizer", "Rounded", "check_bits", "check_weight", "straight_through"]
