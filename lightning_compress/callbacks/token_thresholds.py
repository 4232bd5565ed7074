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

    What is learned is by how many scales a threshold has gone from its first value: :math:`\theta_l = \theta_l^0 + c_l
    p_l` with :math:`p_l = 0` at first, so that one learning rate fits layers whose scores differ much or little.

    A budget is kept by the augmented Lagrangian :math:`\mu (r - t) + \frac\rho2 (r - t)^2` with the expected relative
    cost r, the target t, and a multiplier :math:`\mu` that grows by :math:`r - t` in every step.

    Args:
        values: the first thresholds, :math:`\theta^0`.
        device: where they live.
        scales: :math:`c`, positive; by default 1.

    Attributes:
        offsets: the parameter :math:`p`.
        multiplier: :math:`\mu`.
    """

    def __init__(self, values: Sequence[float], device: torch.device, scales: Sequence[float] | None = None) -> None:
        self.first = torch.tensor(tuple(values), dtype=torch.float32, device=device)
        self.scales = torch.ones_like(self.first) if scales is None else self.first.new_tensor(tuple(scales))
        self.offsets = nn.Parameter(torch.zeros_like(self.first))
        self.optimizer = torch.optim.Adam([self.offsets])
        self.multiplier = 0.0
        self._misses: list[Tensor] = []
        self._ready: list[float] | None = None

    @property
    def thresholds(self) -> Tensor:
        """The thresholds, with gradients to ``offsets``."""
        with torch.enable_grad():
            return self.first + self.scales * self.offsets

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
        gradient = self.offsets.grad
        own = torch.zeros_like(self.first) if gradient is None else gradient / scale
        misses = torch.stack(self._misses) if self._misses else own.new_zeros(0)
        # one small message: the gradients, the sum of the misses and their number
        message = torch.cat([own, misses.sum().reshape(1).float(), own.new_full((1,), float(len(misses)))])
        self._ready = processes.mean("average gradients of thresholds", message).tolist()
        self.offsets.grad = None
        self._misses.clear()

    def step(self, learning_rate: float) -> None:
        """Move the thresholds and the multiplier, after the weights have really been moved."""
        if self._ready is None:
            return
        *gradient, miss, number = self._ready
        self._ready = None
        if not all(math.isfinite(g) for g in gradient):
            return
        self.offsets.grad = torch.tensor(gradient, device=self.offsets.device)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.offsets.grad = None
        if number and math.isfinite(miss):
            self.multiplier += MULTIPLIER_STEP * miss / number

    def skip(self) -> None:
        """Forget the gradients of a step that was not made."""
        self._ready = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed fit needs."""
        gradient = self.offsets.grad
        return {
            "first": self.first.clone(),
            "scales": self.scales.clone(),
            "offsets": self.offsets.detach().clone(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "multiplier": self.multiplier,
            "gradient": None if gradient is None else gradient.clone(),
            "misses": [float(m) for m in self._misses],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> ThresholdLearner:
        """What ``state_dict`` has described."""
        learner = cls(state["first"].tolist(), device, state["scales"].tolist())
        with torch.no_grad():
            learner.offsets.copy_(state["offsets"])
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.multiplier = state["multiplier"]
        if state["gradient"] is not None:
            learner.offsets.grad = state["gradient"].to(device)
        learner._misses = [torch.tensor(m, device=device) for m in state["misses"]]
        return learner


__all__ = ["ThresholdLearner"]
