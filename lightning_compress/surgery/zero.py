"""Silencing units without removing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_compress.plan import PruningPlan
from lightning_compress.structures import named_tensors
from lightning_compress.surgery.edits import Removal, outside, zeroed_axes
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.optimizer_state import zero_state
from lightning_compress.surgery.silence import Silence, silence

# Units of these kinds are modules, or are chosen by a router: no weight silences them.
MASKED_KINDS = ("layer", "expert")


def silence_units(model: nn.Module, plan: PruningPlan) -> Silence:
    """Let ``model`` compute what it will after ``plan``, at its full size, until the masks are taken off.

    Weights that read removed units are zero, normalisations leave them out, removed layers return their inputs, removed
    experts are never chosen. Nothing of this is permanent: the weights come back with ``remove``.

        with silence_units(model, plan):
            evaluate(model)

    Args:
        model: the model that the plan was made for.
        plan: which units go; of any kind.

    Returns:
        The masks: a context manager with a method ``remove``.

    Raises:
        ValueError: if the plan is for another model, or a module is silenced already.
    """
    plan.check(model)
    removals = outside([Removal(s, plan.kept[s.name]) for s in plan.structures])
    masks = silence(dict(model.named_modules()), removals)
    tensors = named_tensors(model)
    for (name, axis), positions in zeroed_axes(removals).items():
        masks.zero(tensors[name], axis, positions)
    return masks


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
        ValueError: if the plan is for another model, or zeros alone do not silence its units: see ``silence_units``.
    """
    plan.check(model)
    for structure in plan.structures:
        if structure.kind in MASKED_KINDS and plan.removed(structure.name):
            raise SurgeryError(
                f"Expected a plan whose units are silent once their weights are zero, but those of {structure.name!r} "
                f"({structure.kind}) also need a mask. Use silence_units(model, plan), which puts it on until it is "
                "removed again."
            )
    tensors = named_tensors(model)
    removals = [Removal(s, plan.kept[s.name]) for s in plan.structures]
    optimizers = tuple(optimizers)
    for (name, axis), positions in zeroed_axes(removals).items():
        tensor = tensors[name]
        tensor.index_fill_(axis, positions.to(tensor.device), 0)
        if tensor.grad is not None:
            tensor.grad.index_fill_(axis, positions.to(tensor.device), 0)
        zero_state(optimizers, tensor, {axis: positions})
