"""What a checkpoint knows of a compression, and how a fresh dense module takes the shape of a compressed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import Pinned, Structures, named_tensors
from lightning_compress.surgery import apply_plan
from lightning_compress.surgery.record import records


def structures_state(model: nn.Module, structures: Structures) -> dict[str, Any]:
    """Structures with their costs, as text and numbers; ``model`` is the model as it is described by them."""
    return {
        "structures": PruningPlan.of(model, structures, {}).to_json(),
        **{name: _terms(getattr(structures, name)) for name in ("weight_macs", "activation_macs", "params")},
        "pinned": [(p.name, p.kind, p.units, list(p.parameters), list(p.reasons)) for p in structures.pinned],
    }


def structures_from_state(state: Mapping[str, Any]) -> Structures:
    """What ``structures_state`` has described."""
    costs: dict[str, Any] = {
        name: Polynomial({tuple(key): coefficient for key, coefficient in state[name]})
        for name in ("weight_macs", "activation_macs", "params")
    }
    pinned = [Pinned(name, kind, units, tuple(p), tuple(r)) for name, kind, units, p, r in state["pinned"]]
    return Structures(PruningPlan.from_json(state["structures"]).structures, pinned=pinned, **costs)


def _terms(polynomial: Polynomial) -> list[tuple[list[str], float]]:
    return [(list(key), coefficient) for key, coefficient in polynomial]


def plans_state(plans: Sequence[PruningPlan]) -> list[str]:
    """Plans as text."""
    return [plan.to_json() for plan in plans]


def plans_from_state(session: Mapping[str, Any]) -> list[PruningPlan]:
    """The removals that the state of a session tells of, one after the other.

    A checkpoint of an earlier version has one plan for all of them.
    """
    texts = session.get("plans")
    if texts is None:
        texts = [] if session["plan"] is None else [session["plan"]]
    return [PruningPlan.from_json(text) for text in texts]


def take_shape(model: nn.Module, plans: Sequence[PruningPlan]) -> None:
    """Carry out ``plans``, one after the other, but for those that have been carried out on ``model`` already.

    Each goes in its own way, which need not be that of the one before. The weights are about to be replaced by those of
    a checkpoint, and the removals were verified when they were made.
    """

    def shapes(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
        tensors = named_tensors(model)
        return {name: tuple(tensors[name].shape) for name in plan.shapes if name in tensors}

    dense = bool(plans) and shapes(plans[0]) == plans[0].shapes
    done = [] if dense else [n for n, plan in enumerate(plans, 1) if shapes(plan) == plan.new_shapes()]
    for plan in plans[max(done, default=0) :]:
        if shapes(plan) != plan.new_shapes() and (shapes(plan) == plan.shapes or not records(model)):
            apply_plan(model, plan)


def check_shapes(pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError where a module that has lost units is about to load the weights of a larger or smaller one."""
    if not records(pl_module):
        return
    weights = checkpoint.get("state_dict", {})
    for name, tensor in pl_module.state_dict().items():
        if name in weights and isinstance(tensor, Tensor) and tensor.shape != weights[name].shape:
            there, here = tuple(weights[name].shape), tuple(tensor.shape)
            when = "before units were removed" if weights[name].numel() > tensor.numel() else "after other removals"
            raise ValueError(
                f"Expected a checkpoint of the small model, because that is what {type(pl_module).__name__} is now, "
                f"but this one was written {when}, at step {checkpoint.get('global_step')}: {name!r} has the shape "
                f"{there} there and {here} here. Build the module anew and pass that with the checkpoint, to the "
                "Trainer with its callbacks or to lightning_compress.load_from_checkpoint: it takes the shape that "
                "the checkpoint was written in."
            )


def before_load(pl_module: pl.LightningModule, prepare: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
    """Call ``prepare(checkpoint)`` before the weights of a checkpoint are loaded; returns how to undo that.

    A callback sees a checkpoint when the weights have been loaded, which is too late to give the module their shape.
    The module's own ``on_load_checkpoint`` is in time.
    """
    original = pl_module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        prepare(checkpoint)
        original(checkpoint)

    pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]

    def undo() -> None:
        if vars(pl_module).get("on_load_checkpoint") is on_load_checkpoint:
            del pl_module.on_load_checkpoint

    return undo
