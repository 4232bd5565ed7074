r"""Second-order removal (Optimal Brain Surgeon): what is lost when the units that stay take over as well as they can.

For one matrix W that reads the units, with second moment H of its inputs, leaving out the columns M of a unit and
moving the others costs, in the squared error of its outputs,

.. math:: \rho_u = \operatorname{tr}\bigl( W_M\, [H^{-1}_{MM}]^{-1} W_M^\top \bigr),
          \qquad W \leftarrow W - W_M [H^{-1}_{MM}]^{-1} H^{-1}_{M,:}

The cheapest unit goes, W and the inverse follow, and so on to the last: units are never judged as if the others that
go were still there (Kurtic, Frantar & Alistarh 2023, "ZipLM").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.post_training.moments import InputMoments
from lightning_compress.post_training.products import columns, matrix, readers
from lightning_compress.structures import Structure, named_tensors


class SecondOrder:
    """An importance function: the error that each unit adds when it goes, in the order in which they go best.

    The scores of the first k units add up to the error that is left when all of them are gone and the others have taken
    over, or a little more: a unit that adds less than one before it counts as much. ``repair_readers`` lets the others
    take over.

    Args:
        moments: what ``input_moments`` returned.
        damping: added to the diagonal of H, as a fraction of its mean.
        relative: divide by the squared outputs of the matrix, so that errors of different layers compare.
        metrics: weight of each output in the error, (outputs,), by parameter name, in place of ``relative``: with the
            mean squared gradient of the loss by each output, errors are in units of the loss.

    Raises:
        ValueError: for a damping that is not positive; when called, for a structure without moments.
    """

    def __init__(
        self,
        moments: Mapping[str, InputMoments],
        damping: float = 0.01,
        relative: bool = True,
        metrics: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not damping > 0:
            raise ValueError(f"Expected damping to be positive, but got {damping}.")
        self.moments, self.damping, self.relative, self.metrics = moments, damping, relative, metrics

    @torch.no_grad()
    def __call__(self, model: nn.Module, structure: Structure) -> Tensor:
        """Scores of the units of one structure, (units,), float64 on the CPU."""
        tensors = named_tensors(model)
        parts: list[Elimination] = []
        for piece in readers(structure):
            moments = self.moments.get(piece.parameter)
            if moments is None:
                parts = []
                break
            weight = tensors[piece.parameter].detach()
            w, gram = matrix(weight, piece.axis).double(), moments.gram / max(1, moments.rows)
            if self.metrics is not None:
                w = w * self.metrics[piece.parameter].to(w).sqrt().unsqueeze(1)
            elif self.relative:
                w = w / ((w @ gram) * w).sum().sqrt().clamp(min=1e-30)
            parts.append(Elimination(w, gram, columns(weight, piece), self.damping))
        if not parts:
            raise ValueError(
                f"Expected moments of the inputs of what reads structure {structure.name!r} ({structure.kind}), but "
                "there are none: its units are not read by a linear layer or a convolution that was called. Use "
                "another importance for it."
            )
        return eliminate(parts, structure.units)


class Elimination:
    """One matrix whose units are eliminated one after the other.

    The inverse H^-1 and W are never written: after the units 1 ... k they are H^-1 - V V^T and W - B V^T, where each
    unit has added its columns to V and B (a Cholesky decomposition with pivots). Only the diagonal blocks of what is
    left, and of W^T W, are kept up to date: enough for the saliency of every unit.

    Args:
        weight: W, (outputs, columns), float64.
        gram: H, (columns, columns).
        table: columns of each unit, (units, p).
        damping: as a fraction of the mean of the diagonal of H.
    """

    def __init__(self, weight: Tensor, gram: Tensor, table: Tensor, damping: float) -> None:
        size = gram.shape[0]
        level = float(gram.diagonal().mean()) * damping or 1.0
        damped = gram + level * torch.eye(size, dtype=gram.dtype, device=gram.device)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self.w, self.table = weight, table.to(weight.device)
        units, p = table.shape
        self.v = torch.zeros(size, units * p, dtype=gram.dtype, device=gram.device)
        self.b = torch.zeros(weight.shape[0], units * p, dtype=gram.dtype, device=gram.device)
        self.gone = torch.zeros(units, dtype=torch.bool, device=gram.device)
        self.used = 0
        rows, cols = self.table.unsqueeze(2), self.table.unsqueeze(1)
        self.blocks = self.inverse[rows, cols]  # (units, p, p)
        by_unit = weight[:, self.table]  # (outputs, units, p)
        self.norms = torch.einsum("oup,ouq->upq", by_unit, by_unit)

    def saliency(self) -> Tensor:
        """Error that each unit would add now, (units,)."""
        if self.blocks.shape[-1] == 1:
            return (self.norms / self.blocks.clamp(min=1e-300))[:, 0, 0]
        eye = torch.eye(self.blocks.shape[-1], dtype=self.blocks.dtype, device=self.blocks.device)
        blocks = torch.where(self.gone[:, None, None], eye, self.blocks)  # nothing is left of those but rounding
        return torch.linalg.solve(blocks, self.norms).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Take a unit out; the others take over."""
        own = self.table[unit]
        v, b = self.v[:, : self.used], self.b[:, : self.used]
        factor = torch.linalg.cholesky(self.blocks[unit])
        a = self._over(self.inverse[:, own] - v @ v[own].T, factor)  # (columns, p)
        c = self._over(self.w[:, own] - b @ v[own].T, factor)  # (outputs, p)
        cross = self.w.T @ c - v @ (b.T @ c)  # W^T c as W is now, (columns, p)
        by_unit, crossed = a[self.table], cross[self.table]  # (units, p, q)
        self.blocks = self.blocks - by_unit @ by_unit.mT
        mixed = crossed @ by_unit.mT
        self.norms = self.norms - mixed - mixed.mT + by_unit @ (c.T @ c) @ by_unit.mT
        p = own.numel()
        self.v[:, self.used : self.used + p], self.b[:, self.used : self.used + p] = a, c
        self.used += p
        self.gone[unit] = True

    @staticmethod
    def _over(values: Tensor, factor: Tensor) -> Tensor:
        """values L^-T."""
        if factor.numel() == 1:
            return values / factor
        return torch.linalg.solve_triangular(factor, values.T, upper=False).T


def eliminate(parts: Sequence[Elimination], units: int) -> Tensor:
    """Scores of all units: the error that each adds, in order; a unit that adds less than one before counts as much."""
    scores = torch.zeros(units, dtype=torch.float64)
    gone = torch.zeros(units, dtype=torch.bool)
    worst = 0.0
    for number in range(units):
        saliency = torch.stack([part.saliency().cpu() for part in parts]).sum(0).clamp(min=0)
        unit = int(saliency.masked_fill(gone, torch.inf).argmin())
        worst = max(worst, float(saliency[unit]))
        scores[unit], gone[unit] = worst, True
        if number < units - 1:
            for part in parts:
                part.remove(unit)
    return scores


__all__ = ["SecondOrder"]
