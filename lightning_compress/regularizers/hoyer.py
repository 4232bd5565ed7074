"""The structured Hoyer square."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.regularizers._checks import checked_norms, checked_step
from lightning_compress.regularizers.lasso import shrinking_factors


def hoyer_square(norms: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Structured Hoyer square (SHS), a smooth count of the groups that are alive.

    .. math::
        H = \frac{A^2}{B} \in [1, G], \quad A = \sum_g s_g, \quad B = \sum_g s_g^2, \qquad
        \frac{\partial H}{\partial s_g} = \frac{2A}{B} \Bigl(1 - \frac{s_g}{t}\Bigr), \quad t = \frac{B}{A}

    H does not change when all weights are multiplied by a constant, so its gradient is orthogonal to the weights:
    groups below the trim point t shrink and groups above it grow. H of no group, or of groups that are all zero, is 0
    with gradient 0.

    Args:
        norms: group norms :math:`s_g`, shape ``(groups,)``.
        weights: positive weights, shape ``(groups,)``; with them the groups are compared, and counted, by
            :math:`s_g / w_g`. Default: 1.

    Returns:
        Scalar tensor.

    Raises:
        TypeError: if ``norms`` is not floating-point.
        ValueError: if ``norms`` is not a vector, or ``weights`` has another shape.

    References: Yang, Wen & Li 2020, "DeepHoyer: Learning Sparser Neural Network with Differentiable Scale-Invariant
    Sparsity Measures"; Mao, Yang, Li, Li & Chen 2021, "TPrune: Efficient Transformer Pruning for Mobile Devices".

    >>> import torch
    >>> hoyer_square(torch.tensor([2.0, 2.0, 2.0, 0.0]))
    tensor(3.)
    """
    relative, _ = _relative_to_largest(norms, weights)
    square_sum = relative.square().sum()
    return relative.sum().square() / square_sum.masked_fill(square_sum == 0, 1.0)


@torch.no_grad()
def hoyer_square_factors(norms: Tensor, step: float, weights: Tensor | None = None) -> Tensor:
    r"""Shrinking step for the structured Hoyer square, as one factor per group.

    The penalty is linearised at the current norms, only its trim side is kept (groups above the trim point
    :math:`t = B / A` are left alone instead of being inflated), and the reweighted group lasso that results is applied
    by its proximal map:

    .. math:: f_g = \max\bigl(0,\ 1 - \text{step} \cdot c_g / s_g \bigr), \qquad c_g = 2 \max(0,\ 1 - s_g / t)

    :math:`c_g` is the gradient of `hoyer_square` times t. The bare gradient grows as 1 / norm, so that its strength
    would have to follow the scale of each matrix; dividing by the number of groups instead, which makes the *penalty*
    comparable between matrices, makes the *step* G times weaker in a matrix of G groups. With t as the unit, ``step``
    is a length, as in `group_lasso_factors` (the mean of :math:`c_g` over norms spread evenly on [0, t] is 1), and the
    factors do not change when norms and ``step`` are scaled together, when the groups are repeated, or when dead groups
    are removed.

    Args:
        norms: group norms, shape ``(groups,)``; all groups that are to be compared with each other, usually those of
            one matrix or structure.
        step: learning rate times strength, >= 0.
        weights: positive weights, shape ``(groups,)``; the step is then taken on :math:`s_g / w_g`, as in the group
            lasso. Default: 1.

    Returns:
        Factors in [0, 1], shape ``(groups,)``. A group that is zero has factor 0; a single group, or equal ones, have
        factor 1.

    Raises:
        TypeError: if ``norms`` is not floating-point.
        ValueError: if ``norms`` is not a vector, ``weights`` has another shape, or ``step`` is negative or not finite.

    >>> import torch
    >>> hoyer_square_factors(torch.tensor([3.0, 1.0, 0.0]), step=0.5)  # t = 10 / 4, so c = 2 * (1 - 0.4) for the second
    tensor([1.0000, 0.4000, 0.0000])
    """
    step = checked_step(step)
    relative, largest = _relative_to_largest(norms, weights)
    per_trim_point = relative.sum() / relative.square().sum()  # 1 / t, in units of the largest norm
    pull = 2.0 * (1.0 - relative * per_trim_point).clamp(min=0.0)
    return shrinking_factors(relative, step * pull / largest)


def _relative_to_largest(norms: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Norms (over weights) in units of the largest, and that unit: so squares neither overflow nor underflow.

    The unit is a constant for autograd, which changes no gradient: Hoyer's measure has no scale.
    """
    norms, weights = checked_norms(norms, weights)
    scaled = norms if weights is None else norms / weights
    largest = scaled.detach().amax() if scaled.numel() else scaled.new_ones(())
    largest = largest.masked_fill(largest == 0, 1.0)
    return scaled / largest, largest
