"""Which scores the tokens of a model have, layer by layer, before any is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.token_policies import KeepAll
from lightning_compress.token_scores import scores_among_rest

LEAST = 1e-3  # spread of scores that are all alike, in units of the mean score
MOST = 10**6  # scores that are looked at; `quantile` refuses very many
NORMAL = 1.349  # distance of the quartiles of a normal distribution, in standard deviations


@dataclass(frozen=True)
class ScoreSpread:
    """Scores of a layer, as by ``scores_among_rest``.

    Args:
        median: half of the tokens have less.
        spread: distance of the quartiles over that of a normal distribution: of such scores the standard deviation.
            A few tokens that receive most of the attention do not show in it.
    """

    median: float
    spread: float


class ScoreObserver(KeepAll):
    """A policy that keeps all tokens and remembers the scores of those that are not protected anyway."""

    def __init__(self, decisions: int) -> None:
        object.__setattr__(self, "seen", [[] for _ in range(decisions)])

    def keeps_all(self, layer: int) -> bool:
        """No: it wants to see the scores."""
        return False

    def keep(
        self, layer: int, scores: Tensor, active: Tensor, real: Tensor, protected: Tensor | None, min_keep: int
    ) -> Tensor:
        """All that is active; see ``TokenPolicy.keep``."""
        free = active if protected is None else active & ~protected
        seen: list[list[Tensor]] = vars(self)["seen"]
        seen[layer].append(scores_among_rest(scores.detach(), free)[free].double().cpu())
        return super().keep(layer, scores, active, real, protected, min_keep)

    def spreads(self) -> Tensor:
        """Median and spread for every decision, (decisions, 2); of no scores at all those of equal attention."""
        rows: list[Any] = []
        for parts in vars(self)["seen"]:
            scores = torch.cat(parts) if parts else torch.empty(0)
            scores = scores[scores.isfinite()]
            scores = scores[:: 1 + scores.numel() // MOST]
            low, middle, high = (
                scores.quantile(scores.new_tensor((0.25, 0.5, 0.75))).tolist() if scores.numel() else (1.0, 1.0, 1.0)
            )
            rows.append((middle, max(LEAST, (high - low) / NORMAL)))
        return torch.tensor(rows, dtype=torch.float64)


__all__ = ["ScoreObserver", "ScoreSpread"]
