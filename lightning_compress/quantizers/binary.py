"""Two and three values: binary and ternary weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.quantizers.base import Quantizer, Rounded
from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.quantized import Grid

THRESHOLD = 0.7  # of the mean magnitude, below which a ternary weight is 0


@dataclass(frozen=True)
class Binary(Quantizer):
    r"""Two values for every block.

    .. math:: \hat w = \begin{cases} m_+ & w \ge \bar w \\ m_- & w < \bar w \end{cases}

    the means of the elements on each side of the mean; not centred :math:`\hat w = \alpha \operatorname{sign}(w)` with
    :math:`\alpha = \operatorname{mean}|w|` and sign(0) = 1. Both have the least squared error for their signs.

    Args:
        scope: which elements share the two values: "tensor", "row" or "group:K".
        centred: whether the values may lie around another point than 0.
        scaled: False for +1 and -1 as they are, as in the report of Vineeth S.; attention then needs logits divided by
            25 d, d the dims of a head, in place of the square root of d (``SCALE_FREE_LOGITS``).
        clip: gradients pass where :math:`|w|` is at most this; None passes all.

    Raises:
        ValueError: for another scope, a clip that is not positive, or values that are centred and not scaled.

    References: Rastegari et al. 2016, "XNOR-Net"; Courbariaux et al. 2016, "Binarized Neural Networks".
    """

    scope: str = "row"
    centred: bool = True
    scaled: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        Scope(self.scope)
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"Expected clip, where gradients end, to be above 0, but got {self.clip!r}.")
        if self.centred and not self.scaled:
            raise ValueError("Expected centred=False with scaled=False: +1 and -1 lie around 0, but got centred=True.")

    @classmethod
    def of_the_report(cls) -> Binary:
        """The binary weights of Vineeth S.'s report: the sign, with gradients where the weight is at most 1.

        Its code has sign(0) = 0; here it is 1, so that a bit holds it.
        """
        return cls("tensor", centred=False, scaled=False, clip=1.0)

    @property
    def stored_bits(self) -> int:
        """One."""
        return 1

    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """The value of the side on which an element lies."""
        passes = None if self.clip is None else blocks.abs() <= self.clip
        if not self.centred:
            size = blocks.abs().mean(1, keepdim=True) if self.scaled else torch.ones_like(blocks[:, :1])
            return Rounded(Grid(0, 1, 2 * size, -size), (blocks >= 0).to(blocks.dtype), passes)
        above = (blocks >= blocks.mean(1, keepdim=True)).to(blocks.dtype)
        below, number = 1 - above, above.sum(1, keepdim=True)
        upper = (blocks * above).sum(1, keepdim=True) / number.clamp(min=1)
        lower = (blocks * below).sum(1, keepdim=True) / (blocks.shape[1] - number).clamp(min=1)
        # where all elements are alike they lie on one side
        lower, upper = torch.where(number == blocks.shape[1], upper, lower), torch.where(number == 0, lower, upper)
        return Rounded(Grid(0, 1, upper - lower, lower), above, passes)


@dataclass(frozen=True)
class Ternary(Quantizer):
    r"""Three values for every block, of which one is 0.

    .. math:: \hat w = \alpha \operatorname{sign}(w)\,[|w| > \Delta], \quad \Delta = 0.7 \operatorname{mean}|w|, \quad
        \alpha = \operatorname{mean}_{|w| > \Delta} |w|

    Args:
        scope: which elements share the values: "tensor", "row" or "group:K".

    Raises:
        ValueError: for another scope.

    References: Li and Liu 2016, "Ternary Weight Networks".
    """

    scope: str = "row"

    def __post_init__(self) -> None:
        Scope(self.scope)

    @property
    def stored_bits(self) -> int:
        """Two."""
        return 2

    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """The sign of large elements, 0 for small ones."""
        sizes = blocks.abs()
        large = (sizes > THRESHOLD * sizes.mean(1, keepdim=True)).to(blocks.dtype)
        size = (sizes * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp(min=1)
        return Rounded(Grid(-1, 1, size), blocks.sign() * large)


SCALE_FREE_LOGITS = 25  # times the dims of a head: what logits of attention between +1 and -1 weights are divided by

__all__ = ["SCALE_FREE_LOGITS", "Binary", "Ternary"]
