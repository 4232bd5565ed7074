"""Silencing units without removing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_compress.plan import PruningPlan
from lightning_compress.structures import named_tensors
from lightning_compress.surgery.edits import Removal, zeroed_axes
from lightning_compress.surgery.optimizer_state import zero_state


@torch.no_grad()
def zero_units(model: nn.Module, plan: PruningPlan, optimizers: Iterable[Any] = ()) -> None:
    """Set the removed units of ``plan`` to zero in place, so that they add nothing to any output in evaluation mode.

    What is zeroed are the slices that silence a unit exactly: the weights that read it (W_O columns of a head, W_2
    columns of an FFN unit), or those that make it where it meets another activation (W_Q and W_K rows of a Q/K dim).
    Gradients at the same positions are zeroed too, and with ``optimizers`` the optimizer state, or momentum would bring
    the unit back.

    Args:
        model: the model that the plan was made for.
        plan: which units go.
        optimizers: optimizers of the model.

    Raises:
        ValueError: if the plan is for another model.
    """
    plan.check(model)
    tensors = named_tensors(model)
    removals = [Removal(s, plan.kept[s.name]) for s in plan.structures]
    optimizers = tuple(optimizers)
    for (name, axis), positions in zeroed_axes(removals).items():
        tensor = tensors[name]
        tensor.index_fill_(axis, positions.to(tensor.device), 0)
        if tensor.grad is not None:
            tensor.grad.index_fill_(axis, positions.to(tensor.device), 0)
        zero_state(optimizers, tensor, {axis: positions})
