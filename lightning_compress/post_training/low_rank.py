r"""Low-rank significance: how much of a unit the leading singular directions of its weights leave out.

.. math:: A \approx A_k = U_k S_k V_k^\top, \qquad r_u = \lVert A_u - (A_k)_u \rVert^2

A small residual means that the unit lies in the span of the leading directions, where others could stand in for it. It
does not mean that the unit is small: a strong unit inside that span has a residual of zero. That is why the residual
alone is a poor guide, and why there are forms of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.post_training.moments import InputMoments
from lightning_compress.post_training.products import columns, matrix, readers
from lightning_compress.structures import Slice, Structure, named_tensors

Form = Literal["residual", "relative", "activation"]


class LowRankSignificance:
    r"""An importance function: scores by the singular value decomposition of the weights that read the units.

    - ``"residual"``: :math:`s_u = r_u`.
    - ``"relative"``: :math:`s_u = r_u / \lVert A_u \rVert^2`, in [0, 1], free of scale.
    - ``"activation"``: :math:`s_u = r_u / \sum_v \lVert A_v \rVert^2` for :math:`A\,C^{1/2}` in the place of A, C being
      the second moment of the inputs: directions that inputs do not take do not count, and layers compare.

    With ``scores`` (the diagonal Fisher information, say) the relative residual is a factor on them: what is both
    unimportant and replaceable goes first.

    Args:
        rank: k as a fraction of the full rank, in (0, 1).
        form: see above.
        moments: for "activation", what ``input_moments`` returned.
        scores: scores to combine with, by structure name.

    Raises:
        ValueError: for an unknown form, a rank outside (0, 1), or moments that are missing; when called, for a
            structure that no weight reads.
    """

    def __init__(
        self,
        rank: float = 0.5,
        form: Form = "relative",
        moments: Mapping[str, InputMoments] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not 0 < rank < 1:
            raise ValueError(f"Expected rank, the fraction of singular directions, to be in (0, 1), but got {rank}.")
        if form not in get_args(Form):
            raise ValueError(f"Expected form to be one of {get_args(Form)}, but got {form!r}.")
        if form == "activation" and moments is None:
            raise ValueError("Expected moments=input_moments(...) for form='activation', but got None.")
        self.rank, self.form, self.moments, self.scores = rank, form, moments, scores

    @torch.no_grad()
    def __call__(self, model: nn.Module, structure: Structure) -> Tensor:
        """Scores of the units of one structure, (units,), float64."""
        pieces = readers(structure)
        if not pieces:
            raise ValueError(
                f"Expected weights that read the units of structure {structure.name!r} ({structure.kind}), but there "
                "are none, so that there is nothing to decompose. Use another importance for it."
            )
        tensors = named_tensors(model)
        left = torch.zeros(structure.units, dtype=torch.float64)
        whole = torch.zeros(structure.units, dtype=torch.float64)
        for piece in pieces:
            residual, total = self._residual(tensors[piece.parameter].detach(), piece)
            left, whole = left + residual, whole + total
        relative = left / whole.clamp(min=torch.finfo(torch.float64).tiny)
        if self.scores is not None:
            return self.scores[structure.name].double().cpu() * relative
        if self.form == "activation":
            return left / whole.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return relative if self.form == "relative" else left

    def _residual(self, weight: Tensor, piece: Slice) -> tuple[Tensor, Tensor]:
        """Squared residual and squared norm of each unit, (units,)."""
        a = matrix(weight, piece.axis).double()
        if self.form == "activation":
            assert self.moments is not None
            moments = self.moments.get(piece.parameter)
            if moments is None:
                raise ValueError(
                    f"Expected moments of the inputs of {piece.parameter!r}, but there are none: it is not used in a "
                    "product with its inputs. Use form='relative'."
                )
            values, vectors = torch.linalg.eigh(moments.gram / max(1, moments.rows))
            a = a @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        k = min(len(s) - 1, max(1, round(self.rank * len(s))))
        rest = (u[:, k:] * s[k:]) @ vh[k:]
        table = columns(weight, piece).to(a.device)
        return tuple(m.square().sum(0)[table].sum(1).cpu() for m in (rest, a))  # type: ignore[return-value]


__all__ = ["LowRankSignificance"]
