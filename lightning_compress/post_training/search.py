"""Search over masks beyond ranking: which units of a structure go together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan


def joint_loss(fisher: Tensor, removed: Tensor) -> float:
    r"""What a quadratic model of the loss says of removing these units together: :math:`1_R^\top F\, 1_R`.

    Args:
        fisher: full Fisher information of the units, (units, units).
        removed: bool (units,).
    """
    return float(fisher[removed][:, removed].sum())


def joint_scores(fisher: Tensor) -> Tensor:
    r"""What each unit adds to :math:`1_R^\top F\, 1_R` when it goes, in the order in which units go best.

    The diagonal of F says what a unit costs alone. Units of a late layer often push the loss the same way: each costs
    next to nothing, all of them everything. These scores tell the budget.

    Args:
        fisher: full Fisher information of the units, (units, units).

    Returns:
        Scores of shape (units,): a unit that adds less than one before it counts as much.
    """
    fisher = fisher.double()
    units = fisher.shape[0]
    adds = fisher.diagonal().clone()  # of each unit to what is gone: F_uu + 2 (F 1_R)_u
    gone = torch.zeros(units, dtype=torch.bool)
    scores = torch.zeros(units, dtype=torch.float64)
    worst = 0.0
    for _ in range(units):
        unit = int(adds.masked_fill(gone, torch.inf).argmin())
        worst = max(worst, float(adds[unit]))
        scores[unit], gone[unit] = worst, True
        adds += 2 * fisher[:, unit]
    return scores


def rearranged(fisher: Tensor, removed: Tensor) -> Tensor:
    """As many units to remove, chosen so that they cost less together; never more than ``removed`` do.

    From the given units on, each other unit, the least important first, comes in, and the one that is then best left
    in the model goes back, which may be the same. (Kwon et al. 2022.)

    Args:
        fisher: full Fisher information of the units, (units, units).
        removed: bool (units,), the units to begin with.

    Returns:
        Bool of shape (units,).
    """
    fisher, gone = fisher.double(), removed.clone()
    if not bool(gone.any()) or bool(gone.all()):
        return gone
    diagonal = fisher.diagonal()
    order = torch.argsort(diagonal.masked_fill(gone, torch.inf), stable=True)[: int((~gone).sum())]
    sums = fisher[:, gone].sum(1)  # F 1_R
    for unit in order.tolist():
        sums += fisher[:, unit]
        gone[unit] = True
        # leaving u in the model changes 1^T F 1 by -(2 (F 1_R)_u - F_uu)
        gain = (2 * sums - diagonal).masked_fill(~gone, -torch.inf)
        best = int(gain.argmax())
        # of equal gains the newcomer's: nothing moves without a reason
        back = unit if float(gain[best]) <= float(gain[unit]) else best
        sums -= fisher[:, back]
        gone[back] = False
    return gone


def rearranged_plan(model: nn.Module, plan: PruningPlan, matrices: Mapping[str, Tensor]) -> PruningPlan:
    """``plan`` with other units of the same number in each structure, see ``rearranged``."""
    kept: dict[str, Tensor] = {}
    for structure in plan.structures:
        gone = torch.zeros(structure.units, dtype=torch.bool)
        gone[list(plan.removed(structure.name))] = True
        if structure.name in matrices:
            gone = rearranged(matrices[structure.name], gone)
        kept[structure.name] = torch.nonzero(~gone).reshape(-1)
    return PruningPlan.of(model, plan.structures, kept)


__all__ = ["joint_loss", "joint_scores", "rearranged", "rearranged_plan"]
