"""The thresholds of learned token pruning: parameters with an optimizer and a budget of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.processes import Processes

PENALTY = 20.0  # a budget missed by 0.05 weighs as much as one unit of loss per unit of cost
MULTIPLIER_STEP = 1.0


class ThresholdLearner:
    r"""One scalar per decision, learned beside the weights: never decayed, never clipped with them.

    A budget is kept by the augmented Lagrangian :math:`\mu (r - t) + \frac\rho2 (r - t)^2` with the expected relative
    cost r, the target t, and a multiplier :math:`\mu` that grows by :math:`r - t` in every step.

    Args:
        values: the first thresholds.
        device: where they live.

    Attributes:
        thresholds: the parameter.
        multiplier: :math:`\mu`.
    """

    def __init__(self, values: Sequence[float], device: torch.device) -> None:
        self.thresholds = nn.Parameter(torch.tensor(tuple(values), dtype=torch.float32, device=device))
        self.optimizer = torch.optim.Adam([self.thresholds])
        self.multiplier = 0.0
        self._misses: list[Tensor] = []
        self._ready: list[float] | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """The thresholds as numbers."""
        return tuple(self.thresholds.detach().tolist())

    def budget(self, cost: Tensor, target: float) -> Tensor:
        """The term of the loss that brings ``cost``, a scalar with gradients, to ``target``."""
        miss = cost - target
        self._misses.append(miss.detach())
        return self.multiplier * miss + PENALTY / 2 * miss**2

    def collect(self, processes: Processes, scale: float) -> None:
        """Take the gradients of the step that is about to be made, averaged over the processes.

        Args:
            processes: those of the fit; all of them call this.
            scale: by which a gradient scaler has multiplied the loss.
        """
        gradient = self.thresholds.grad
        own = torch.zeros_like(self.thresholds) if gradient is None else gradient / scale
        misses = torch.stack(self._misses) if self._misses else own.new_zeros(0)
        # one small message: the gradients, the sum of the misses and their number
        message = torch.cat([own, misses.sum().reshape(1).float(), own.new_full((1,), float(len(misses)))])
        self._ready = processes.mean("average gradients of thresholds", message).tolist()
        self.thresholds.grad = None
        self._misses.clear()

    def step(self, learning_rate: float) -> None:
        """Move the thresholds and the multiplier, after the weights have really been moved."""
        if self._ready is None:
            return
        *gradient, miss, number = self._ready
        self._ready = None
        if not all(math.isfinite(g) for g in gradient):
            return
        self.thresholds.grad = torch.tensor(gradient, device=self.thresholds.device)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.thresholds.grad = None
        if number and math.isfinite(miss):
            self.multiplier += MULTIPLIER_STEP * miss / number

    def skip(self) -> None:
        """Forget the gradients of a step that was not made."""
        self._ready = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed fit needs."""
        gradient = self.thresholds.grad
        return {
            "thresholds": self.thresholds.detach().clone(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "multiplier": self.multiplier,
            "gradient": None if gradient is None else gradient.clone(),
            "misses": [float(m) for m in self._misses],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> ThresholdLearner:
        """What ``state_dict`` has described."""
        learner = cls(state["thresholds"].tolist(), device)
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.multiplier = state["multiplier"]
        if state["gradient"] is not None:
            learner.thresholds.grad = state["gradient"].to(device)
        learner._misses = [torch.tensor(m, device=device) for m in state["misses"]]
        return learner


__all__ = ["ThresholdLearner"]
