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

BLOCK = 64  # columns


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
    r"""One matrix whose units are eliminated one after the other.

    Kept up to date are the diagonal blocks of the inverse and of W^T W, which give the saliency of every unit. The
    matrices themselves follow in blocks, because most of their columns are never asked for: in between, they are

    .. math:: H^{-1} - V V^\top, \qquad W^\top W - X V^\top - V X^\top

    Args:
        weight: W, (outputs, columns), float64.
        gram: H, (columns, columns).
        table: columns of each unit, (units, p).
        damping: as a fraction of the mean of the diagonal of H.
    """

    def __init__(self, weight: Tensor, gram: Tensor, table: Tensor, damping: float) -> None:
        level = float(gram.diagonal().mean()) * damping or 1.0
        damped = gram + level * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self.products = weight.T @ weight
        self.table = table.to(weight.device)
        units, p = table.shape
        self.v, self.x = (torch.zeros(gram.shape[0], max(BLOCK, p), dtype=gram.dtype, device=gram.device) for _ in "vx")
        self.used = 0
        self.gone = torch.zeros(units, dtype=torch.bool, device=gram.device)
        rows, cols = self.table.unsqueeze(2), self.table.unsqueeze(1)
        self.blocks, self.norms = self.inverse[rows, cols], self.products[rows, cols]  # (units, p, p)

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
        p = own.numel()
        if self.used + p > self.v.shape[1]:
            self._flush()
        v, x = self.v[:, : self.used], self.x[:, : self.used]
        factor = torch.linalg.cholesky(self.blocks[unit])
        a = self._over(self.inverse[:, own] - v @ v[own].T, factor)  # (columns, p)
        # W^T c, where c = W_M L^-T is what the unit gives to the others, and c^T c
        cross = self._over(self.products[:, own] - x @ v[own].T - v @ x[own].T, factor)
        square = self._over(self._over(self.norms[unit], factor).T, factor)
        change = cross - a @ square / 2
        by_unit, changed = a[self.table], change[self.table]  # (units, p, p)
        mixed = changed @ by_unit.mT
        self.blocks = self.blocks - by_unit @ by_unit.mT
        self.norms = self.norms - mixed - mixed.mT
        self.v[:, self.used : self.used + p], self.x[:, self.used : self.used + p] = a, change
        self.used += p
        self.gone[unit] = True

    def _flush(self) -> None:
        v, x = self.v[:, : self.used], self.x[:, : self.used]
        self.inverse.addmm_(v, v.T, alpha=-1)
        self.products.addmm_(x, v.T, alpha=-1).addmm_(v, x.T, alpha=-1)
        self.used = 0

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
