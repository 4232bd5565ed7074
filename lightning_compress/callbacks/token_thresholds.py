"""The thresholds of learned token pruning: parameters with an optimizer and a budget of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.processes import Processes

# Scales per unit of relative cost: about 0.15 of it is saved by a scale, so that a miss decays in a few steps.
GAIN = 2.0
MOST = 0.25  # scales in one step


class ThresholdLearner:
    r"""One scalar per decision, learned beside the weights: never decayed, never clipped with them.

    What is learned is by how many scales a threshold has gone from its first value: :math:`\theta_l = \theta_l^0 + c_l
    (p_l + q)` with :math:`p_l = q = 0` at first, so that one learning rate fits layers whose scores differ much or
    little.

    A budget is kept by the common shift q, which grows in every step by a multiple of :math:`r - t`, the expected
    relative cost over the target; the loss then decides how thresholds differ from it, and only its gradients reach
    :math:`p`, less their mean. Pressed by the cost itself, the first layers would come to take everything: their
    thresholds save the most, and in the gradients of the others the noise of a batch is larger than what they save.

    Args:
        values: the first thresholds, :math:`\theta^0`.
        device: where they live.
        scales: :math:`c`, positive; by default 1.

    Attributes:
        offsets: the parameter :math:`p`.
        shift: :math:`q`.
    """

    def __init__(self, values: Sequence[float], device: torch.device, scales: Sequence[float] | None = None) -> None:
        self.first = torch.tensor(tuple(values), dtype=torch.float32, device=device)
        self.scales = torch.ones_like(self.first) if scales is None else self.first.new_tensor(tuple(scales))
        self.offsets = nn.Parameter(torch.zeros_like(self.first))
        self.optimizer = torch.optim.Adam([self.offsets])
        self.shift = 0.0
        self._misses: list[Tensor] = []
        self._ready: list[float] | None = None

    @property
    def thresholds(self) -> Tensor:
        """The thresholds, with gradients to ``offsets``."""
        with torch.enable_grad():
            return self.first + self.scales * (self.offsets + self.shift)

    @property
    def values(self) -> tuple[float, ...]:
        """The thresholds as numbers."""
        return tuple(self.thresholds.detach().tolist())

    def budget(self, cost: Tensor, target: float) -> None:
        """Note by how much ``cost``, a scalar, misses ``target``: the next step shifts the thresholds by it."""
        self._misses.append(cost.detach() - target)

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
        """Move the thresholds, after the weights have really been moved."""
        if self._ready is None:
            return
        *gradient, miss, number = self._ready
        self._ready = None
        if not all(math.isfinite(g) for g in gradient):
            return
        own = torch.tensor(gradient, device=self.offsets.device)
        self.offsets.grad = own - own.mean() if number else own
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.offsets.grad = None
        if number and math.isfinite(miss):
            self.shift += max(-MOST, min(MOST, GAIN * miss / number))

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
            "shift": self.shift,
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
        learner.shift = state["shift"]
        if state["gradient"] is not None:
            learner.offsets.grad = state["gradient"].to(device)
        learner._misses = [torch.tensor(m, device=device) for m in state["misses"]]
        return learner


__all__ = ["ThresholdLearner"]
