"""Learned step sizes of quantizers: parameters with an optimizer of their own, beside that of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_compress.callbacks.processes import Processes


class HasStep(Protocol):
    """What has a learned step, a leaf tensor; None before it is known."""

    @property
    def step(self) -> Tensor | None:
        """The tensor."""
        ...


class StepLearner:
    """Moves the steps of quantizers after each step of the optimizers; never decayed, never clipped with the weights.

    Adam moves a parameter by about its learning rate, so the rate is relative: of every step tensor to its mean.

    Args:
        owners: whose steps are learned. They may get other tensors (another shape, after a removal), with which
            learning begins anew.
    """

    def __init__(self, owners: Sequence[HasStep]) -> None:
        self.owners = list(owners)
        self._ready: list[float] | None = None
        self._begin()

    def _begin(self) -> None:
        self._learned = [owner.step for owner in self.owners if owner.step is not None]
        groups = [{"params": [step], "size": float(step.detach().abs().mean())} for step in self._learned]
        self.optimizer = torch.optim.Adam(groups) if groups else None

    def collect(self, processes: Processes, scale: float) -> None:
        """Take the gradients of the step that is about to be made, averaged over the processes.

        Args:
            processes: those of the fit; all of them call this.
            scale: by which a gradient scaler has multiplied the loss.
        """
        now = [owner.step for owner in self.owners if owner.step is not None]
        if len(now) != len(self._learned) or any(a is not b for a, b in zip(now, self._learned, strict=True)):
            self._begin()
        if not self._learned:
            return
        parts = [torch.zeros_like(s) if s.grad is None else s.grad / scale for s in self._learned]
        device = self._learned[0].device
        message = torch.cat([part.reshape(-1).float().to(device) for part in parts])
        self._ready = processes.mean("average gradients of step sizes", message).tolist()
        for step in self._learned:
            step.grad = None

    def step(self, learning_rate: float) -> None:
        """Move the steps, after the weights have really been moved."""
        if self._ready is None or self.optimizer is None:
            return
        values, self._ready = torch.tensor(self._ready), None
        if not all(math.isfinite(v) for v in values.tolist()):
            return
        for step, part in zip(self._learned, values.split([s.numel() for s in self._learned]), strict=True):
            step.grad = part.reshape(step.shape).to(step)
        for group in self.optimizer.param_groups:
            if not group["size"]:  # set by the first batch
                group["size"] = float(group["params"][0].detach().abs().mean())
            group["lr"] = learning_rate * group["size"]
        self.optimizer.step()
        for step in self._learned:
            step.grad = None

    def skip(self) -> None:
        """Forget the gradients of a step that was not made."""
        self._ready = None

    def state_dict(self) -> dict[str, Any]:
        """Everything but the steps that a resumed fit needs."""
        return {
            "optimizer": None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "gradients": [None if s.grad is None else s.grad.clone() for s in self._learned],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` has described, for the same steps."""
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        for step, gradient in zip(self._learned, state["gradients"], strict=True):
            step.grad = None if gradient is None else gradient.to(step)


__all__ = ["StepLearner"]
