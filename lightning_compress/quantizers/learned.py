"""Learned step size quantization (LSQ)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantizers.base import Quantizer, Rounded, check_bits
from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.quantized import Grid

LEAST = 1e-8  # step


@dataclass(frozen=True)
class LearnedStep(Quantizer):
    r"""Equal steps whose size is learned by the loss.

    .. math:: \hat w = c \operatorname{clip}(\operatorname{round}(w / c), -Q_N, Q_P), \quad
        \frac{\partial \hat w}{\partial c} = \begin{cases} \operatorname{round}(w/c) - w/c & -Q_N < w/c < Q_P \\
        -Q_N \text{ or } Q_P & \text{beyond} \end{cases}

    with :math:`Q_P = 2^{b-1} - 1 = Q_N`, gradients of c multiplied by :math:`g = 1 / \sqrt{N Q_P}` for a block of N
    elements, those of w passed within the ends, and :math:`c_0 = 2 \operatorname{mean}|w| / \sqrt{Q_P}`.

    The two ends are alike, so that 0 is in the middle; as published there is one more step on the negative side.

    Args:
        bits: :math:`b`, from 2 to 8.
        scope: which elements share a step: "tensor", "row" or "group:K".

    Raises:
        ValueError: for other bits or scopes.

    References: Esser et al. 2020, "Learned Step Size Quantization".
    """

    bits: int = 4
    scope: str = "row"

    def __post_init__(self) -> None:
        check_bits("LearnedStep", self.bits, 2, 8)
        Scope(self.scope)

    @property
    def stored_bits(self) -> int:
        """Those of the argument."""
        return self.bits

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        high = 2 ** (self.bits - 1) - 1
        return -high, high

    def first_step(self, weight: Tensor) -> Tensor:
        """:math:`c_0`, (blocks, 1)."""
        with torch.no_grad():
            return 2 * self.blocks(weight).abs().mean(1, keepdim=True) / math.sqrt(self.ends[1])

    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """The nearest steps between the ends."""
        if step is None:
            raise ValueError("Expected the step of LearnedStep, but got none: begin with first_step(weight).")
        grid = Grid(*self.ends, step.detach().to(blocks.dtype).clamp(min=LEAST))
        positions, inside = grid.cut(grid.positions(blocks))
        return Rounded(grid, positions.round_(), inside)

    def __call__(self, weight: Tensor, generator: torch.Generator | None = None, step: Tensor | None = None) -> Tensor:
        """The weight with the values of the grid, and gradients for it and for its step; see ``Quantizer``."""
        if step is None:
            raise ValueError("Expected the step of LearnedStep, but got none: begin with first_step(weight).")
        blocks = self.blocks(weight)
        return learned_step(blocks, step.to(blocks.dtype), *self.ends).reshape(weight.shape).to(weight.dtype)


def learned_step(values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    r"""Values in steps of a learned size, with the gradients of LSQ.

    Args:
        values: (blocks, elements), weights or activations.
        step: (blocks, 1); at least 1e-8 is used.
        low: the smallest integer, 0 for activations without a sign.
        high: the largest integer, at least 1.

    Returns:
        Like the values.
    """
    result: Tensor = _LearnedStep.apply(values, step, low, high)
    return result


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.ends = low, high
        grid = Grid(low, high, step.clamp(min=LEAST))
        return grid.values(grid.nearest(values))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, step = ctx.saved_tensors
        (gradient,) = gradients
        low, high = ctx.ends
        grid = Grid(low, high, step.clamp(min=LEAST))
        positions = grid.positions(values)
        cut, inside = grid.cut(positions)
        by_step = cut.round_().sub_(positions.masked_fill_(~inside, 0))  # the ends where something was cut off
        share = 1 / math.sqrt(max(1, values.shape[1]) * high)
        of_step = share * by_step.mul_(gradient).sum(1, keepdim=True)
        return gradient * inside, of_step, None, None


__all__ = ["LearnedStep", "learned_step"]
