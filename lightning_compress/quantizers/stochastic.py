"""Stochastic quantization as in QSGD: unbiased rounding to levels of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compress.quantizers.base import Quantizer, Rounded, check_bits
from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.quantized import Grid

Norm = Literal["l2", "max", "mse"]
FRACTIONS = tuple(0.05 * n for n in range(2, 21))  # of the largest element, looked at for "mse"
CACHED = 2**17  # elements that are looked at together on a CPU, whose caches hold them for all fractions


@dataclass(frozen=True)
class Stochastic(Quantizer):
    r"""Levels of a norm; in training an element goes to one of its two neighbours at random, so that it is unbiased.

    .. math:: Q(w_i) = \lVert w \rVert \operatorname{sign}(w_i)\,\xi_i, \quad
        \xi_i \in \left\{\tfrac{l}{s}, \tfrac{l+1}{s}\right\}, \quad
        P\left(\xi_i = \tfrac{l+1}{s}\right) = \tfrac{|w_i| s}{\lVert w \rVert} - l

    with :math:`E[Q(w)] = w` and, for the Euclidean norm of n elements,
    :math:`E\lVert Q(w) - w \rVert^2 \le \min(n / s^2, \sqrt n / s) \lVert w \rVert^2`. With b bits, the sign one of
    them, :math:`s = 2^{b-1} - 1`; a single bit has the two levels :math:`\pm\lVert w \rVert`. In evaluation it rounds
    to the nearest level.

    Args:
        bits: :math:`b`, from 1 to 8.
        norm: "max", the largest element; "l2", the Euclidean norm, which leaves most levels unused where a block has
            more than a few elements; "mse", the part of the largest element with the least squared error of rounding to
            the nearest, beyond which elements are cut: it is not unbiased there, and takes four to five times as long.
            Elements that are cut get no gradients, except with the two levels of one bit, where too many are cut.
        scope: which elements share a norm: "tensor", "row" or "group:K".
        strict: whether the sign is one of the bits; without, there are :math:`s = 2^b - 1` levels of each sign.

    Raises:
        ValueError: for other bits, norms or scopes.

    References: Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding".
    """

    bits: int = 4
    norm: Norm = "max"
    scope: str = "row"
    strict: bool = True

    def __post_init__(self) -> None:
        check_bits("Stochastic", self.bits, 1, 8)
        if self.norm not in get_args(Norm):
            raise ValueError(f"Expected norm to be one of {list(get_args(Norm))}, but got {self.norm!r}.")
        Scope(self.scope)

    @classmethod
    def of_the_report(cls, bits: int) -> Stochastic:
        """The literal formula of Vineeth S.'s report: the Euclidean norm of the whole tensor.

        Its levels are so far apart that nearly every weight of a large tensor becomes 0: for the study of that.
        """
        return cls(bits, "l2", "tensor", strict=False)

    @classmethod
    def of_the_code(cls, bits: int) -> Stochastic:
        """What the code released with that report computes in training: the largest element of the whole tensor.

        There "b bits" are :math:`2^{b+1} - 1` levels, as the sign is not counted. Not taken over: integers of 8 bits
        that overflow, biases that are lost in evaluation, and evaluation that is random.
        """
        return cls(bits, "max", "tensor", strict=False)

    @property
    def _two_levels(self) -> bool:
        return self.strict and self.bits == 1

    @property
    def stored_bits(self) -> int:
        """Those of the argument, and one for the sign if it is not among them."""
        return self.bits if self.strict else self.bits + 1

    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """One of the two neighbouring levels, by chance in proportion to how near it is, or the nearest."""
        if self.norm == "l2":
            grid = self._levels(blocks.norm(dim=1, keepdim=True))
        else:
            largest = blocks.abs().amax(1, keepdim=True)
            grid = self._levels(largest) if self.norm == "max" else self._closest(blocks, largest)
        exact = grid.positions(blocks)
        positions = exact.clamp(grid.low, grid.high)
        # the levels of a single bit lie at the mean magnitude, and about two in five elements beyond it
        passes = positions == exact if self.norm == "mse" and not self._two_levels else None
        if generator is None:
            integers = positions.round_()
        else:
            chance = torch.rand(positions.shape, generator=generator, dtype=positions.dtype, device=generator.device)
            integers = positions.add_(chance.to(positions.device)).floor_().clamp_(grid.low, grid.high)
        return Rounded(grid, integers, passes)

    def _levels(self, norm: Tensor) -> Grid:
        if self._two_levels:
            return Grid(0, 1, 2 * norm, -norm)
        steps = 2 ** (self.bits - 1) - 1 if self.strict else 2**self.bits - 1
        return Grid(-steps, steps, norm / steps)

    def _closest(self, blocks: Tensor, largest: Tensor) -> Grid:
        """The grid with the least squared error among some; of two levels it is known."""
        if self._two_levels:
            return self._levels(blocks.abs().mean(1, keepdim=True))
        rows = CACHED // blocks.shape[1] if blocks.device.type == "cpu" else len(blocks)
        parts = zip(blocks.split(max(1, rows)), largest.split(max(1, rows)), strict=True)
        return self._levels(torch.cat([self._best(*part) for part in parts]))

    def _best(self, blocks: Tensor, largest: Tensor) -> Tensor:
        """The norm with the least squared error of each block."""
        best, least = largest, torch.full_like(largest, torch.inf)
        for fraction in FRACTIONS:
            grid = self._levels(fraction * largest)
            # in place: new memory for every one of these tensors would take most of the time
            error = grid.nearest(blocks).mul_(grid.scale).sub_(blocks).square_().sum(1, keepdim=True)
            best = torch.where(error < least, fraction * largest, best)
            least = torch.minimum(error, least)
        return best


__all__ = ["Norm", "Stochastic"]
