"""The group lasso, and the trimmed group lasso in which a budget decides who pays."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.regularizers._checks import checked_norms, checked_step, require_mask


def group_lasso(norms: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Group lasso, the penalty of structured sparsity learning (SSL).

    .. math:: R = \sum_g w_g s_g, \qquad \partial R / \partial s_g = w_g

    Args:
        norms: group norms :math:`s_g`, shape ``(groups,)``.
        weights: non-negative weights :math:`w_g`, shape ``(groups,)``; the usual choice is ``sqrt(size of the group)``,
            times its cost when groups differ in what their removal saves. Default: 1.

    Returns:
        Scalar tensor.

    Raises:
        TypeError: if ``norms`` is not floating-point.
        ValueError: if ``norms`` is not a vector, or ``weights`` has another shape.

    References: Yuan & Lin 2006, "Model selection and estimation in regression with grouped variables"; Wen, Wu, Wang,
    Chen & Li 2016, "Learning Structured Sparsity in Deep Neural Networks".

    >>> import torch
    >>> group_lasso(torch.tensor([5.0, 0.0]), weights=torch.tensor([2.0, 1.0]))
    tensor(10.)
    """
    norms, weights = checked_norms(norms, weights)
    return norms.sum() if weights is None else (weights * norms).sum()


@torch.no_grad()
def group_lasso_factors(norms: Tensor, step: float, weights: Tensor | None = None) -> Tensor:
    r"""Proximal map of the group lasso (block soft-thresholding), as one factor per group.

    .. math:: f_g = \max(0,\ 1 - \text{step} \cdot w_g / s_g)

    For a group with values v, :math:`f_g v` minimises :math:`\tfrac12 \lVert x - v \rVert^2 + \text{step} \cdot w_g
    \lVert x \rVert`: its norm falls by ``step * w_g`` and stops at exactly 0. A group that is zero already has factor
    0. A norm that is not finite gives a NaN factor.

    Args:
        norms: group norms, shape ``(groups,)``.
        step: learning rate times strength, >= 0.
        weights: non-negative weights, shape ``(groups,)``. Default: 1.

    Returns:
        Factors in [0, 1], shape ``(groups,)``, in the dtype of ``norms`` (float32 for half precision).

    Raises:
        TypeError: if ``norms`` is not floating-point.
        ValueError: if ``norms`` is not a vector, ``weights`` has another shape, or ``step`` is negative or not finite.

    Reference: Parikh & Boyd 2014, "Proximal Algorithms", section 6.5.4.

    >>> import torch
    >>> group_lasso_factors(torch.tensor([5.0, 1.0, 0.0]), step=2.0)
    tensor([0.6000, 0.0000, 0.0000])
    """
    norms, weights = checked_norms(norms, weights)
    step = checked_step(step)
    return shrinking_factors(norms, step if weights is None else step * weights)


def shrinking_factors(norms: Tensor, shrinkage: Tensor | float) -> Tensor:
    """max(0, norms - shrinkage) / norms, with 0 for a zero group and NaN passed on.

    Written without shrinkage / norms: that is infinite for a tiny norm, and NaN where the shrinkage is 0 as well.
    """
    return ((norms - shrinkage).clamp(min=0.0) / norms).masked_fill(norms == 0, 0.0)


def trimmed_group_lasso(norms: Tensor, protected: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Group lasso over the groups outside a protected set.

    .. math:: R = \sum_{g \notin P} w_g s_g

    With P the groups that a budget keeps this is the trimmed lasso: it is 0 exactly when the budget is met, and it puts
    no bias on what stays.

    Args:
        norms: group norms, shape ``(groups,)``.
        protected: bool, shape ``(groups,)``; True where a group is to be kept.
        weights: non-negative weights, shape ``(groups,)``. Default: 1.

    Returns:
        Scalar tensor.

    Raises:
        TypeError: if ``norms`` is not floating-point or ``protected`` is not bool.
        ValueError: if ``norms`` is not a vector, or ``protected`` or ``weights`` has another shape.

    References: Bertsimas, Copenhaver & Mazumder 2017, "The Trimmed Lasso: Sparsity and Robustness"; Yun, Zheng, Yang,
    Lozano & Aravkin 2019, "Trimming the l1 Regularizer: Statistical Analysis, Optimization, and Applications to Deep
    Learning".

    >>> import torch
    >>> trimmed_group_lasso(torch.tensor([5.0, 1.0]), protected=torch.tensor([True, False]))
    tensor(1.)
    """
    norms, weights = checked_norms(norms, weights)
    require_mask(protected, norms)
    return group_lasso(norms.masked_fill(protected, 0.0), weights)


@torch.no_grad()
def trimmed_group_lasso_factors(norms: Tensor, step: float, protected: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Proximal map of the trimmed group lasso: 1 for a protected group, `group_lasso_factors` for the others.

    If P is the k groups of largest norm and all weights are 1, this is the exact proximal map of the (non-convex)
    trimmed lasso :math:`\text{step} \cdot \min_{|P| = k} \sum_{g \notin P} s_g`, not only of the penalty for a fixed P.

    Args:
        norms: group norms, shape ``(groups,)``.
        step: learning rate times strength, >= 0.
        protected: bool, shape ``(groups,)``; True where a group is to be kept.
        weights: non-negative weights, shape ``(groups,)``. Default: 1.

    Returns:
        Factors in [0, 1], shape ``(groups,)``.

    Raises:
        TypeError: if ``norms`` is not floating-point or ``protected`` is not bool.
        ValueError: if ``norms`` is not a vector, ``protected`` or ``weights`` has another shape, or ``step`` is
            negative or not finite.

    >>> import torch
    >>> kept = torch.tensor([True, False, False])
    >>> trimmed_group_lasso_factors(torch.tensor([5.0, 4.0, 1.0]), step=2.0, protected=kept)
    tensor([1.0000, 0.5000, 0.0000])
    """
    factors = group_lasso_factors(norms, step, weights)
    require_mask(protected, norms)
    return factors.masked_fill(protected, 1.0)
