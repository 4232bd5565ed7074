r"""Least squares for the columns of one weight: :math:`\min_\Theta \lVert X \Theta^\top - Y \rVert^2` with damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.post_training.moments import moment


@dataclass
class Sums:
    """Moments of the inputs X of a weight with the outputs Y that are wanted.

    Args:
        gram: X^T X, (columns, columns), float64; with a last column of ones where there is a bias.
        cross: X^T Y, (columns, outputs), float64.
        bias: whether there is one.
        square: |Y|^2.
    """

    gram: Tensor
    cross: Tensor
    bias: bool
    square: float = 0.0

    @classmethod
    def of(cls, columns: int, outputs: int, bias: bool, device: torch.device) -> Sums:
        """Of nothing yet; ``columns`` without the one of the bias."""
        size = columns + bias
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        return cls(gram, torch.zeros(size, outputs, dtype=torch.float64, device=device), bias)

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """Add rows of X, (rows, columns), and of Y, (rows, outputs)."""
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1) if self.bias else rows
        self.gram.add_(moment(rows, rows))
        self.cross.add_(moment(rows, wanted))
        self.square += float(wanted.double().square().sum())

    def error(self, theta: Tensor) -> float:
        """|X theta^T - Y|^2 / |Y|^2, theta (outputs, columns)."""
        value = float(((theta @ self.gram) * theta).sum()) - 2 * float((theta.T * self.cross).sum()) + self.square
        return max(0.0, value) / self.square if self.square else 0.0


def whole(now: Tensor, sums: Sums, keep: Tensor, damping: float) -> Tensor:
    """Least squares for all columns that stay, and the bias, around what they are.

    Args:
        now: what they are, (outputs, columns).
        sums: the moments.
        keep: bool (columns without the bias,).
        damping: as a fraction of the mean of the diagonal of X^T X; 0 for the solution of smallest norm.
    """
    stay = torch.nonzero(keep).reshape(-1)
    if sums.bias:
        stay = torch.cat([stay, stay.new_tensor([keep.numel()])])
    stay = stay.to(now.device)
    gram = sums.gram[stay][:, stay].clone()
    missing = sums.cross[stay] - sums.gram[stay] @ now.T  # (columns that stay, outputs)
    level = damping * float(sums.gram.diagonal()[: keep.numel()][keep.to(now.device)].mean())
    theta = now.clone()
    theta[:, stay] += solved(gram, missing, level).T
    return theta


def scaled(now: Tensor, sums: Sums, units: Tensor, damping: float) -> Tensor:
    r"""Least squares for one factor per unit: the outputs are :math:`\sum_u s_u X_u W_u^\top + b`.

    Args:
        now: the weight, (outputs, columns).
        sums: the moments.
        units: columns of each unit, int64 (units, columns).
        damping: as a fraction of the mean of the diagonal.
    """
    units = units.to(now.device)
    owner = torch.full((sums.gram.shape[0],), -1, dtype=torch.long, device=now.device)
    owner[units.reshape(-1)] = torch.arange(units.shape[0], device=now.device).repeat_interleave(units.shape[1])
    mine = owner >= 0
    products = (sums.gram * (now.T @ now))[mine][:, mine]
    total = products.new_zeros(units.shape[0], units.shape[0])
    total.index_put_((owner[mine].unsqueeze(1).expand_as(products), owner[mine].expand_as(products)), products, True)
    missing = ((sums.cross - sums.gram @ now.T) * now.T).sum(1)[mine]
    right = missing.new_zeros(units.shape[0]).index_add_(0, owner[mine], missing)
    change = solved(total, right.unsqueeze(1), damping * float(total.diagonal().mean()))[:, 0]
    theta = now.clone()
    theta[:, mine] *= 1 + change[owner[mine]]
    return theta


def solved(gram: Tensor, right: Tensor, level: float) -> Tensor:
    """(gram + level)^-1 right; without damping the solution of smallest norm."""
    if level > 0:
        damped = gram + level * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(gram)
    small = values <= values[-1].clamp(min=0) * gram.shape[0] * torch.finfo(gram.dtype).eps
    inverse = torch.where(small, torch.zeros_like(values), 1 / values.masked_fill(small, 1.0))
    return vectors @ (inverse.unsqueeze(1) * (vectors.T @ right))


__all__ = ["Sums", "scaled", "solved", "whole"]
