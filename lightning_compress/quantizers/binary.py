"""Two and three values: binary and ternary weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.quantizers.base import Quantizer, Rounded
from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.quantized import Grid

SCALE_FREE_LOGITS = 25  # times the dims of a head: what logits of attention between +1 and -1 weights are divided by
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
        scaled: False for two values that do not depend on the weight, ``size`` and -``size``.
        clip: gradients pass where :math:`|w|` is at most this; None passes all.
        size: the values without ``scaled``.

    Raises:
        ValueError: for another scope, a clip or size that is not positive, values that are centred and not scaled, or a
            size of scaled ones.

    References: Rastegari et al. 2016, "XNOR-Net"; Courbariaux et al. 2016, "Binarized Neural Networks".
    """

    scope: str = "row"
    centred: bool = True
    scaled: bool = True
    clip: float | None = None
    size: float = 1.0

    def __post_init__(self) -> None:
        Scope(self.scope)
        if not 0 < self.size < math.inf:
            raise ValueError(f"Expected size, the magnitude of both values, to be above 0, but got {self.size!r}.")
        if self.scaled and self.size != 1:
            raise ValueError(
                f"Expected scaled=False with a size of the values, but got scaled=True and size={self.size!r}. Leave "
                "size out: it is computed from the weight."
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"Expected clip, where gradients end, to be above 0, but got {self.clip!r}.")
        if self.centred and not self.scaled:
            raise ValueError("Expected centred=False with scaled=False: +1 and -1 lie around 0, but got centred=True.")

    @classmethod
    def of_the_report(cls, head_dim: int | None = None) -> Binary:
        r"""The binary weights of Vineeth S.'s report: the sign, with gradients where the weight is at most 1.

        Products of two matrices without scales are so large that attention looks at one token only. The report divides
        its logits by :math:`25 d` in place of :math:`\sqrt d`. The same comes from queries that are smaller by the
        ratio of both: for their weights give the dims of a head, and the values are :math:`\pm 1 / (25 \sqrt d)`.
        A bias of the queries is not made smaller. The report's code has sign(0) = 0; here it is 1, so that a bit holds
        it.

        Args:
            head_dim: :math:`d`, for weights of queries; None for all others.

        Raises:
            ValueError: for dims below 1.

        >>> Binary.of_the_report(head_dim=64).size
        0.005
        """
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"Expected head_dim, the dims of an attention head, to be at least 1, but got {head_dim}.")
        size = 1.0 if head_dim is None else 1 / (SCALE_FREE_LOGITS * math.sqrt(head_dim))
        return cls("tensor", centred=False, scaled=False, clip=1.0, size=size)

    @property
    def stored_bits(self) -> int:
        """One."""
        return 1

    def rounded(self, blocks: Tensor, generator: torch.Generator | None, step: Tensor | None) -> Rounded:
        """The value of the side on which an element lies."""
        passes = None if self.clip is None else blocks.abs() <= self.clip
        if not self.centred:
            size = blocks.abs().mean(1, keepdim=True) if self.scaled else torch.full_like(blocks[:, :1], self.size)
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


__all__ = ["SCALE_FREE_LOGITS", "Binary", "Ternary"]
